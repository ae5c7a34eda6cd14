"""The whole configuration: its sections, whether they contradict each other, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from opd_ray.config import schedule
from opd_ray.config.binding import ROOMS, RUN
from opd_ray.config.method import STRICT, LossConfig
from opd_ray.config.runtime import CheckpointConfig, DeadlineConfig, ElasticConfig, GuardConfig, RecoveryConfig
from opd_ray.config.sections import (
    BufferConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    MetricsConfig,
    ReferenceConfig,
    RolloutConfig,
    ScorerConfig,
    StudentConfig,
    TeacherConfig,
    WeightsConfig,
)
from opd_ray.messages import Strength

if TYPE_CHECKING:
    from opd_ray.messages import Source


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run."""

    seed: Annotated[int, RUN] = Field(0, ge=0)
    """Seed of prompt order, sampling, initial embedded student and training."""
    name: str | None = None
    """What reports call this kind of run; by default the method that the coefficients amount to."""
    student: Annotated[StudentConfig, RUN] = Field(default_factory=StudentConfig)
    teacher: Annotated[TeacherConfig, RUN] = Field(default_factory=TeacherConfig)
    more_teachers: Annotated[dict[str, TeacherConfig], RUN] = Field(default_factory=dict)
    """Further teachers by name; the first one is called teacher."""
    reference: Annotated[ReferenceConfig, RUN] = Field(default_factory=ReferenceConfig)
    data: Annotated[DataConfig, RUN] = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    buffer: Annotated[BufferConfig, RUN] = Field(default_factory=BufferConfig)
    loss: Annotated[LossConfig, RUN] = Field(default_factory=LossConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    weights: Annotated[WeightsConfig, ROOMS] = Field(default_factory=WeightsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    deadlines: Annotated[DeadlineConfig, ROOMS] = Field(default_factory=DeadlineConfig)

    def __post_init__(self) -> None:
        self._check_sources()
        self._check_sampling()
        self._check_teachers()
        gpus = (self.learner.gpus_per_rank > 0, self.rollout.gpus_per_generator > 0)
        if self.weights.backend == "nccl" and not all(gpus):
            raise ValueError("weights.backend=nccl needs GPUs for the learner and for the generators")
        for name, scorer in {**self.teachers, "reference": self.reference}.items():
            if scorer.follows_student and self.weight_backend == "nccl" and scorer.gpus_per_actor == 0:
                raise ValueError(
                    f"{name}.update={scorer.update} joins the broadcast, which is nccl here and needs a GPU: "
                    f"set {name}.gpus_per_actor, or weights.backend=gloo"
                )

    def _check_sources(self) -> None:
        """Every source that is mixed in has a loss, every loss a source."""
        if self.uses_golden and self.data.golden is None:
            raise ValueError("buffer asks for golden rollouts but data.golden is null")
        for source, mixed_in, how in (
            ("student", self.uses_student, "buffer.prompts_per_step and rollout.responses_per_prompt"),
            ("golden", self.uses_golden, "buffer.golden_per_prompt or buffer.golden_per_step"),
            ("teacher", self.buffer.uses_teacher_rollouts, "buffer.teacher_per_prompt"),
        ):
            used = self.loss.terms[source].used
            if mixed_in and not used:
                raise ValueError(
                    f"{source} rollouts are made ({how}) but loss.{source}.coef is 0: they would not be trained on"
                )
            if used and not mixed_in:
                raise ValueError(
                    f"loss.{source}.coef is above 0 but there are no {source} rollouts; set it to 0 or raise {how}"
                )
        if not self.sources:
            raise ValueError("there are no rollouts of any source: a step would train on nothing")
        buffer = self.buffer
        if buffer.on_policy_probability is not None and not self.uses_student:
            raise ValueError("buffer.on_policy_probability needs student rollouts for its on-policy steps")
        for name, wanted in (("golden", buffer.golden_per_prompt), ("teacher", buffer.teacher_per_prompt)):
            most = schedule.highest(wanted) * buffer.prompts_per_step
            if 0 < most < 0.5:
                raise ValueError(
                    f"buffer.{name}_per_prompt of {schedule.highest(wanted):g} with {buffer.prompts_per_step} prompts "
                    f"a step rounds to no {name} rollouts; raise one of the two"
                )
        if buffer.golden_pairing == "prompt" and buffer.golden_per_step > 0:
            raise ValueError("buffer.golden_pairing=prompt has one solution for each prompt: golden_per_step must be 0")
        if self.loads_golden and not self.uses_golden and self.loss.golden.divergence != "cross_entropy":
            raise ValueError(
                f"loss.golden.divergence={self.loss.golden.divergence}, but only the guard mixes golden rollouts in, "
                "and that takes cross_entropy; raise buffer.golden_per_prompt or set guard.max_golden_per_prompt=0"
            )
        if self.buffer.golden_pairing == "prompt" and self.buffer.prompts_per_step == 0:
            raise ValueError("buffer.golden_pairing=prompt pairs with a step's prompts, but prompts_per_step is 0")
        if self.loss.reference.used and not (self.uses_student or self.loss.reference.on_golden):
            raise ValueError(
                "loss.reference.coef is above 0 but there are no student rollouts; set it to 0, or "
                "loss.reference.on_golden=true"
            )

    def _check_sampling(self) -> None:
        """What the estimators assume of the rollouts."""
        student, rollout = self.loss.student, self.rollout
        reshaped = rollout.temperature != 1 or rollout.top_p < 1
        if student.used and student.divergence in ("k1", "k2", "k3") and reshaped:
            raise ValueError(
                f"loss.student.divergence={student.divergence} estimates a mean over the student's own distribution: "
                "it needs rollout.temperature=1 and rollout.top_p=1 (or a divergence on a support)"
            )
        anchor = self.loss.reference
        if anchor.used and anchor.needs_student_samples and reshaped:
            raise ValueError(
                f"loss.reference.estimator={anchor.estimator} estimates a mean over the student's own distribution: "
                "it needs rollout.temperature=1 and rollout.top_p=1 (or estimator=top_k or full)"
            )
        if self.loss.importance.correction != "none" and reshaped:
            raise ValueError(
                "loss.importance compares with the distribution that was sampled from: it needs "
                "rollout.temperature=1 and rollout.top_p=1"
            )
        if self.loss.advantage.reward_coef > 0 and rollout.responses_per_prompt < 2:
            raise ValueError(
                "loss.advantage.reward_coef compares the responses to one prompt: "
                f"rollout.responses_per_prompt must be 2 or more, got {rollout.responses_per_prompt}"
            )

    def _check_teachers(self) -> None:
        for name in ("teacher", "student", "reference"):
            if name in self.more_teachers:
                raise ValueError(f"more_teachers: the name '{name}' is taken; choose another")
        for name, teacher in self.teachers.items():
            for field, term in self.loss.terms.items():
                exact = term.used and term.on_distributions and term.support != "teacher_top_k"
                if exact and teacher.engine != "torch":
                    raise ValueError(
                        f"loss.{field}.support={term.support} needs {name}.engine=torch: vLLM gives no hidden states "
                        "and no log-probs of chosen tokens"
                    )
            if teacher.privileged and self.data.golden is None:
                raise ValueError(f"{name}.privileged shows golden solutions, but data.golden is null")
            terms = [self.loss.terms[source] for source in self.sources]
            full = any(term.on_distributions and term.support == "full" for term in terms)
            if self.uses_teacher and teacher.follows_student and full:
                raise ValueError(
                    f"{name}.update={teacher.update} cannot be compared with support=full: the learner keeps the "
                    "output layer that the run began with; take a top-k support"
                )
        if self.loss.reference.estimator == "full" and self.reference.follows_student:
            raise ValueError(
                f"reference.update={self.reference.update} cannot be compared with loss.reference.estimator=full: the "
                "learner keeps the output layer that the run began with; take top_k or k2"
            )
        if self.loss.reference.used and self.loss.reference.estimator == "full" and self.reference.engine != "torch":
            raise ValueError("loss.reference.estimator=full needs reference.engine=torch: vLLM gives no hidden states")

    @property
    def loads_golden(self) -> bool:
        """Are golden rollouts trained on, or kept at hand for the guard?"""
        guard_may_mix = self.guard.level not in ("off", "warn") and self.guard.max_golden_per_prompt > 0
        return self.uses_golden or (guard_may_mix and self.uses_student and self.data.golden is not None)

    @property
    def uses_student(self) -> bool:
        """Does the student sample rollouts?"""
        return self.buffer.prompts_per_step > 0 and self.rollout.responses_per_prompt > 0

    @property
    def uses_golden(self) -> bool:
        """Are golden rollouts mixed in at any step?"""
        return self.buffer.uses_golden

    @property
    def sources(self) -> tuple[Source, ...]:
        """What a step may train on."""
        there = {
            "student": self.uses_student,
            "golden": self.uses_golden,
            "teacher": self.buffer.uses_teacher_rollouts,
        }
        return tuple(source for source, used in there.items() if used)

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name."""
        return {"teacher": self.teacher, **self.more_teachers}

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """Role to configuration of the scorer pools that a run starts: teachers by their names, and "reference"."""
        teachers = self.teachers if self.uses_teacher else {}
        return {**teachers, **({"reference": self.reference} if self.uses_reference else {})}

    def needs_teacher(self, source: Source) -> bool:
        """Does the loss of this source compare with a teacher?"""
        term = self.loss.terms[source]
        if source == "student" and term.divergence == "k1":
            advantage = self.loss.advantage
            return term.used and (advantage.teacher_coef > 0 or advantage.extrapolation != 1)
        return term.used and term.needs_teacher

    def needs_reference(self, source: Source) -> bool:
        """Is this source's rollouts' distance to the reference asked for?"""
        extrapolates = self.loss.advantage.extrapolation != 1 and self.loss.student.used
        if source == "student":
            return self.loss.reference.used or extrapolates
        return self.loss.reference.used and self.loss.reference.on_golden

    @property
    def uses_teacher(self) -> bool:
        """Does any source's loss compare with a teacher?"""
        return any(self.needs_teacher(source) for source in self.sources)

    @property
    def uses_reference(self) -> bool:
        return any(self.needs_reference(source) for source in self.sources)

    @property
    def least_strength(self) -> Strength:
        """The least that mixture and anchor amount to at any step: where the guard counts from."""
        return Strength(
            golden_per_prompt=schedule.lowest(self.buffer.golden_per_prompt) if self.uses_golden else 0.0,
            golden_coef=schedule.lowest(self.loss.golden.coef),
            reference_kl_coef=schedule.lowest(self.loss.reference.coef),
            mask_truncated_tails=self.loss.mask_truncated_tails,
        )

    @property
    def student_top_k(self) -> int:
        """Alternatives that generators return with every sampled token; 0 unless a support asks for them."""
        term = self.loss.student
        return term.top_k if term.used and term.on_distributions and term.support == "student_top_k" else 0

    @property
    def method(self) -> str:
        """What the coefficients amount to, for the summary."""
        if not self.uses_student:
            return "sft" if not self.buffer.uses_teacher_rollouts else "sequence_kd"
        if self.loss.student.divergence == "k1" and self.loss.advantage.teacher_coef == 0:
            return "grpo"
        if self.buffer.on_policy_probability is not None:
            return "gkd"
        mixture = self.uses_golden or self.buffer.uses_teacher_rollouts
        if mixture and self.loss.reference.used:
            return "stableopd"
        return "opd" + ("+mixture" if mixture else "") + ("+reference_kl" if self.loss.reference.used else "")

    @property
    def repetition(self) -> tuple[int, float]:
        """(L, τ) of rep(o). A loop of 30 characters shrinks to 30 + 15 bytes: by 4 in 200 characters, by 11 in 500;
        prose by 1.5 there and by 2.5 in 10 000. τ = 10 (L / 10 000)^.32 passes between the two, and through the
        paper's 10 and the 1.7 that was calibrated at 40 characters."""
        metrics = self.metrics
        window = metrics.repetition_window_chars or min(10_000, max(40, 2 * self.rollout.longest_response))
        return window, metrics.repetition_ratio or 10 * (window / 10_000) ** 0.32

    @property
    def label(self) -> str:
        return self.name or self.method

    @property
    def weight_backend(self) -> str:
        if self.weights.backend != "auto":
            return self.weights.backend
        gpu = self.learner.gpus_per_rank > 0 and self.rollout.gpus_per_generator > 0
        return "nccl" if gpu else "gloo"
