"""The objective of a run, in configuration: a loss for each source of rollouts, and the KL to a reference.

    L = Σ_source coef · D_source(π_θ, π_T)  +  β_KL · KL(π_θ‖π_ref)          (METHOD §3, §4)

Every recipe of the literature is a choice of these fields; see opd_ray/recipes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from opd_ray.config import schedule
from opd_ray.config.schedule import Schedule

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "k1", "k2", "k3", "cross_entropy"]
Support = Literal["teacher_top_k", "student_top_k", "full"]
Tail = Literal["bucket", "renormalise", "stop_gradient"]
Correction = Literal["none", "ratio", "clip", "truncate", "mask"]

_ON_DISTRIBUTIONS = ("reverse_kl", "forward_kl", "jsd")
ON_STUDENT_SAMPLES = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TermConfig:
    """The loss on the tokens of one source of rollouts."""

    coef: Schedule = 0.0
    """Weight of this source's loss; a number, or [[step, value], ...] for straight lines between points."""
    divergence: Divergence = "cross_entropy"
    """reverse_kl, forward_kl, jsd (on a support); k1 (a detached advantage), k2, k3 (on the sampled token), whose mean
    gradients are those of the reverse, the reverse and the forward KL; cross_entropy."""
    support: Support = "teacher_top_k"
    """Tokens that reverse_kl, forward_kl and jsd compare: the teacher's top-k, the student's, or the vocabulary."""
    top_k: int = Field(64, ge=2)
    """k of a top-k support; k ≥ vocabulary is exact."""
    tail: Tail = "bucket"
    """The mass outside a top-k support: one more outcome, renormalised away, or gradient weights held constant."""
    beta: float = Field(0.5, gt=0, lt=1)
    """β of jsd: towards 0 like the forward KL, towards 1 like the reverse KL."""
    entropy_gate: ClassVar[float | None] = None
    outliers: ClassVar[str | None] = None
    """Only the loss on what the student sampled may have these."""

    @property
    def used(self) -> bool:
        """Has it a weight at any step?"""
        return schedule.highest(self.coef) > 0

    @property
    def on_distributions(self) -> bool:
        """Does it compare distributions on a support, and not the sampled token alone?"""
        gated = self.entropy_gate is not None or self.outliers == "forward_kl"
        return self.divergence in _ON_DISTRIBUTIONS or gated

    @property
    def is_plain_reverse_kl(self) -> bool:
        """Is it the reverse KL and nothing else?"""
        return self.divergence == "reverse_kl" and self.entropy_gate is None

    @property
    def needs_student_samples(self) -> bool:
        return self.divergence in ON_STUDENT_SAMPLES or (self.on_distributions and self.support == "student_top_k")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdvantageConfig:
    """A of student.divergence=k1: teacher_coef · (log π_T − log π) + reward_coef · (normalised reward) + constant; and,
    of any divergence, what the reward teaches where buffer.evidence leaves a prompt to it."""

    policy: Literal["current", "behaviour"] = "current"
    """π in the advantage: the student that is trained now, or the one that sampled."""
    teacher_coef: float = Field(1.0, ge=0)
    """Weight of the teacher's log-ratio; 0 with a reward_coef is GRPO."""
    reward_coef: float = Field(0.0, ge=0)
    """α: weight of the task's reward (1 when correct), normalised over the responses to one prompt."""
    reward_std: bool = True
    """Divide the group's centred reward by its standard deviation, as GRPO does."""
    extrapolation: float = Field(1.0, ge=0)
    """λ of ExOPD: adds (λ − 1)(log π_T − log π_ref); needs the reference where it is not 1."""
    proximal: float | None = Field(None, gt=0, lt=1)
    """α of TOP-D: the teacher is α π_T + (1 − α) π, whose log-ratio is never below log(1 − α); null for π_T itself."""
    constant: float = Field(0.0, le=0)
    """The same for every token; alone it needs no teacher (OPSA: −.5, with student.lowest_share)."""
    clip: float | None = Field(None, gt=0)
    """Bound on the size of a token's advantage; null for none."""
    discount: float = Field(0.0, ge=0, le=1)
    """γ of the reward-to-go over later tokens (MiniLLM: 1); 0 credits each token with its own log-ratio."""

    @property
    def uses_teacher(self) -> bool:
        return self.teacher_coef > 0 or self.extrapolation != 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImportanceConfig:
    """The weight π_θ/μ of the sampled token, which corrects a loss on that token for rollouts of older weights.

    A divergence on a support is the same whatever token was sampled there, so that it takes none; rollouts of older
    weights visit other states all the same (buffer.max_staleness bounds how old).
    """

    correction: Correction = "none"
    """none; ratio; clip (PPO, k1 only); truncate (at the cap, no gradient); mask (0 outside a range, no gradient)."""
    clip_ratio: float = Field(0.2, gt=0)
    """ε of clip, of loss.loop_advantage, and of the reward where buffer.evidence leaves a prompt to it: the ratio
    counts between 1 − ε and 1 + ε."""
    cap: float = Field(2.0, ge=1)
    """Largest weight of truncate."""
    mask_low: float = Field(0.5, ge=0, le=1)
    """Smallest ratio that mask lets pass."""
    mask_high: float = Field(2.0, ge=1)
    """Largest ratio that mask lets pass."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceTermConfig:
    """β_KL · KL(π_θ‖π_ref), which StableOPD holds the student back with."""

    coef: Schedule = 0.01
    """β_KL; 0 starts no reference model. A number, or [[step, value], ...]."""
    estimator: Literal["top_k", "full", "k2", "k3"] = "top_k"
    """On the reference's top-k support, on the whole vocabulary, or on the student's sampled token: k2, whose mean
    gradient is that of KL(π_θ‖π_ref), or k3, whose value is that KL but whose mean gradient is KL(π_ref‖π_θ)'s."""
    top_k: int = Field(64, ge=2)
    """k of top_k; k ≥ vocabulary is exact."""
    tail: Tail = "bucket"
    """The mass outside the support, as for a source's loss."""
    on_golden: bool = False
    """Also on the states of golden and teacher rollouts, not only on the student's own."""

    @property
    def used(self) -> bool:
        return schedule.highest(self.coef) > 0

    @property
    def needs_student_samples(self) -> bool:
        return self.estimator in ON_STUDENT_SAMPLES

    def __post_init__(self) -> None:
        if self.on_golden and self.needs_student_samples:
            raise ValueError(
                f"reference.estimator={self.estimator} needs tokens that the student sampled, which those of "
                "reference.on_golden are not; take estimator=top_k or full, or on_golden=false"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentTermConfig(TermConfig):
    """L_OPD: the loss on what the student sampled."""

    coef: Schedule = 1.0
    """Weight of L_OPD; a number, or [[step, value], ...]."""
    divergence: Divergence = "reverse_kl"
    """As for every source, and k1 (a detached advantage), k2 or k3 on the sampled token."""
    entropy_gate: float | None = Field(None, ge=0)
    """Adds the forward KL to reverse_kl or k1 where the teacher's entropy exceeds this many nats (EOPD)."""
    entropy_gate_coef: float = Field(1.0, gt=0)
    """Weight of the forward KL that the entropy gate adds."""
    outliers: Literal["mask", "forward_kl"] | None = None
    """TrOPD: k1 counts by min(π_T/π_θ, 1) of the token, and by what is left of 1 the forward KL or nothing; or null."""
    position_weight: float = Field(1.0, ge=1)
    """Weight of a rollout's first token; it falls to 1 as disagreement with the teacher adds up (IW-OPD: 1.5)."""
    lowest_share: float = Field(1.0, gt=0, le=1)
    """Share of each rollout's tokens that are trained on: those that the student found least likely (OPSA: .2)."""

    def __post_init__(self) -> None:
        if self.outliers is not None and self.divergence != "k1":
            raise ValueError(f"outliers={self.outliers} is about divergence=k1, but it is {self.divergence}")
        if self.entropy_gate is not None and self.divergence not in ("reverse_kl", "k1"):
            raise ValueError(f"entropy_gate adds to divergence=reverse_kl or k1, but it is {self.divergence}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GoldenTermConfig(TermConfig):
    """The loss on golden solutions."""

    coef: Schedule = 0.1
    """λ_gold: weight of the loss on golden rollouts; a number, or [[step, value], ...]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The loss of each source, and how tokens are averaged."""

    student: StudentTermConfig = Field(default_factory=StudentTermConfig)
    golden: GoldenTermConfig = Field(default_factory=GoldenTermConfig)
    teacher: TermConfig = Field(default_factory=TermConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)
    reference: ReferenceTermConfig = Field(default_factory=ReferenceTermConfig)
    teachers: Literal["routed", "weighted"] = "routed"
    """Several teachers: each rollout has the one that its row's column teacher names, or all of them by weight."""
    reduction: Literal["token", "sequence", "sum"] = "token"
    """Mean over tokens, mean per rollout and then over rollouts, or sum; with denominators of the whole step."""
    mask_truncated_tails: bool = False
    """Leave the tail of a truncated rollout whose 6-grams nearly all occurred before out of the loss."""
    loop_advantage: float | None = Field(None, le=0)
    """Advantage, as −1, of the repeats (all but the first copy) of a loop that rollout.repetition_detection ended, in
    the place of teacher and reward; 0 leaves them out, null has them taught as all tokens."""

    @property
    def terms(self) -> dict[str, TermConfig]:
        """By source."""
        return {"student": self.student, "golden": self.golden, "teacher": self.teacher}

    def __post_init__(self) -> None:
        for source in ("golden", "teacher"):
            term = self.terms[source]
            if term.used and term.needs_student_samples:
                raise ValueError(
                    f"{source}.divergence={term.divergence} with support={term.support} needs tokens that the student "
                    f"sampled; {source} rollouts take cross_entropy, or a KL on teacher_top_k or full"
                )
        advantage, k1 = self.advantage, self.student.divergence == "k1"
        if not k1 and replace(advantage, reward_coef=0.0, reward_std=True) != AdvantageConfig():
            raise ValueError(f"advantage.* shapes student.divergence=k1, but it is {self.student.divergence}")
        if not (advantage.reward_std or advantage.reward_coef):
            raise ValueError("advantage.reward_std=false, but there is no reward: raise advantage.reward_coef")
        correction, divergence = self.importance.correction, self.student.divergence
        if correction != "none" and divergence in _ON_DISTRIBUTIONS:
            raise ValueError(
                f"importance.correction={correction} weighs the sampled token, but student.divergence={divergence} "
                "does not depend on it: it would correct nothing; take none, or divergence k1, k2 or k3"
            )
        if not k1 and correction in ("ratio", "clip"):
            raise ValueError(
                f"importance.correction={correction} needs student.divergence=k1, but it is {divergence}, which takes "
                "none, truncate or mask"
            )
        if k1 and advantage.teacher_coef == advantage.reward_coef == advantage.constant == 0:
            raise ValueError(
                "advantage.teacher_coef, advantage.reward_coef and advantage.constant are all 0: there is no advantage"
            )
        for name, used in {
            "student.entropy_gate": self.student.entropy_gate is not None,
            "student.outliers": self.student.outliers is not None,
            "student.position_weight": self.student.position_weight > 1,
            "advantage.proximal": advantage.proximal is not None,
        }.items():
            if used and k1 and advantage.teacher_coef == 0:
                raise ValueError(f"{name} looks at a teacher, but advantage.teacher_coef is 0: there is none")
        if self.student.position_weight > 1 and divergence == "cross_entropy":
            raise ValueError("student.position_weight looks at a teacher, but student.divergence is cross_entropy")
        if advantage.discount > 0 and advantage.policy == "current":
            raise ValueError("advantage.discount above 0 needs advantage.policy=behaviour: log-ratios known beforehand")
