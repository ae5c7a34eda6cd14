"""The whole configuration: its sections, whether they contradict each other, and what follows from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from opd_ray.config import schedule
from opd_ray.config.binding import ROOMS, RUN
from opd_ray.config.data import (
    EMBEDDED,
    HELD_OUT,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    MetricsConfig,
    Sources,
    listed,
    set_field,
)
from opd_ray.config.devices import may_share_a_device
from opd_ray.config.learner import LearnerConfig, WeightsConfig
from opd_ray.config.method import ON_STUDENT_SAMPLES, STRICT, LossConfig
from opd_ray.config.runtime import CheckpointConfig, DeadlineConfig, ElasticConfig, GuardConfig, RecoveryConfig
from opd_ray.config.sections import (
    STUDENT,
    BufferConfig,
    ReferenceConfig,
    RolloutConfig,
    ScorerConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_ray.messages import RepetitionRule, Strength

if TYPE_CHECKING:
    from opd_ray.messages import Source


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run."""

    seed: Annotated[int, RUN] = Field(0, ge=0, lt=2**32)
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
    env: Annotated[dict[str, str | int | float], ROOMS] = Field(default_factory=dict)
    """Environment variables of every actor, as {NCCL_DEBUG: INFO}; Ray shows them to all: no place for secrets."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    deadlines: Annotated[DeadlineConfig, ROOMS] = Field(default_factory=DeadlineConfig)

    @classmethod
    def load(cls, path: str | Path | None = None, *overrides: str, **sections: Any) -> Config:
        """Defaults, then a YAML file, then ``learner={"lr": 1e-6}``, then ``"learner.lr=1e-6"``.

        Each is merged over those before. As on the command line, and unlike ``Config(...)``, whose defaults are for
        models of any size, it has what the embedded models need where the student is the embedded one. Raises
        InputError with one line.
        """
        from opd_ray.config import loading  # which knows the embedded models, and this module

        return loading.load(None if path is None else Path(path), overrides, sections)

    def __post_init__(self) -> None:
        if not self.data.task:
            made_up = any(each.made_up for sources in self._judged.values() for each in listed(sources))
            task = "reasoning_gym" if made_up else "math"
            object.__setattr__(self, "data", dataclasses.replace(self.data, task=task))
        self._check_sources()
        self._check_evidence()
        self._check_sampling()
        self._check_ends()
        self._check_scorers()
        self._check_sets()
        if self.weights.backend == "nccl" and not self._on_gpus:
            raise ValueError("weights.backend=nccl needs GPUs for the learner and for the generators")
        if self.weights.backend == "nccl" and self._may_share_devices:
            raise ValueError(
                "weights.backend=nccl refuses two members on one GPU, which fractions of GPUs allow (learner, "
                "generators, scorers that follow the student); give them whole ones, or set weights.backend=gloo"
            )

    def _check_sets(self) -> None:
        """Sets of held-out problems beside data.*, and who judges what."""
        if self.evaluation.sets and self.data.evaluation != EMBEDDED:
            raise ValueError("evaluation.sets have files of their own: make data.evaluation one of them")
        if (task := self.data.task) == "reasoning_gym" or ":" in task:
            return
        for field, sources in self._judged.items():
            if made_up := [each.source for each in listed(sources) if each.made_up]:
                raise ValueError(
                    f"{field} has {made_up[0]}, which its own verifier judges, but data.task is {task}: set "
                    "data.task=reasoning_gym or, beside other problems, a task of your own (module:Class)"
                )

    @property
    def _judged(self) -> dict[str, Sources]:
        """What the task gives verdicts on, by field."""
        held_out = {set_field(name): each.path for name, each in self.evaluation_sets.items()}
        prompts = {"data.prompts": self.data.prompts} if self.buffer.prompts_per_step else {}
        verified = self.data.golden is not None and self.data.golden_filter == "correct"
        return prompts | held_out | ({"data.golden": self.data.golden} if verified else {})

    def _check_sources(self) -> None:
        """Every source that is mixed in has a loss, every loss a source."""
        buffer, reference = self.buffer, self.loss.reference
        if self.buffer.uses_golden and self.data.golden is None:
            raise ValueError("buffer asks for golden rollouts but data.golden is null")
        if self.data.golden and self.buffer.golden_pairing == "prompt" and listed(self.data.golden)[0].weight:
            raise ValueError(
                "data.golden has weights, but buffer.golden_pairing=prompt takes the solutions of the step's prompts; "
                "leave the weights out, or set it to shuffled"
            )
        if not self.sources:
            raise ValueError("there are no rollouts of any source: a step would train on nothing")
        for source, how in (
            ("student", "buffer.prompts_per_step and rollout.responses_per_prompt"),
            ("golden", "buffer.golden_per_prompt or buffer.golden_per_step"),
            ("teacher", "buffer.teacher_per_prompt"),
        ):
            mixed_in, used = source in self.sources, self.loss.terms[source].used
            if mixed_in and not used:
                raise ValueError(
                    f"{source} rollouts are made ({how}) but loss.{source}.coef is 0: they would not be trained on"
                )
            if used and not mixed_in:
                raise ValueError(
                    f"loss.{source}.coef is above 0 but there are no {source} rollouts; set it to 0 or raise {how}"
                )
        if buffer.on_policy_probability is not None and not (self.uses_student and len(self.sources) > 1):
            raise ValueError(
                "buffer.on_policy_probability needs student rollouts for its on-policy steps, and golden or teacher "
                "rollouts for the others"
            )
        for name, wanted in (("golden", buffer.golden_per_prompt), ("teacher", buffer.teacher_per_prompt)):
            most = schedule.highest(wanted) * buffer.prompts_per_step
            if 0 < most < 0.5:
                raise ValueError(
                    f"buffer.{name}_per_prompt of {schedule.highest(wanted):g} with {buffer.prompts_per_step} prompts "
                    f"a step rounds to no {name} rollouts; raise one of the two"
                )
        if self.loads_golden and not buffer.uses_golden and self.loss.golden.divergence != "cross_entropy":
            raise ValueError(
                f"loss.golden.divergence={self.loss.golden.divergence}, but only the guard mixes golden rollouts in, "
                "and that takes cross_entropy; raise buffer.golden_per_prompt or set guard.max_golden_per_prompt=0"
            )
        if reference.used and not (self.uses_student or reference.on_golden):
            raise ValueError(
                "loss.reference.coef is above 0 but there are no student rollouts; set it to 0, or "
                "loss.reference.on_golden=true"
            )

    def _check_evidence(self) -> None:
        """What buffer.evidence chooses between, and whose responses it looks at."""
        buffer, loss = self.buffer, self.loss
        if buffer.evidence is None:
            if loss.student.divergence != "k1" and not (loss.advantage.reward_coef == 0 and loss.advantage.reward_std):
                raise ValueError(
                    f"loss.advantage.* shapes student.divergence=k1, but it is {loss.student.divergence}; without "
                    "buffer.evidence a reward is part of k1 alone"
                )
            return
        golden = buffer.uses_golden
        for wrong, what in (
            (not self.uses_student, "judges the student's rollouts, but there are none"),
            (not self.needs_teacher("student"), "is about the teacher that loss.student compares with: there is none"),
            (
                buffer.on_policy_probability is not None,
                "decides by prompt, buffer.on_policy_probability by step: leave one of the two out",
            ),
            (bool(self.more_teachers), "looks at one teacher, but there are more_teachers"),
            (self.teacher.privileged, "judges what the teacher writes, which teacher.privileged shows the solution to"),
            (
                self.teacher.follows_student,
                f"keeps what it has seen of the teacher, which teacher.update={self.teacher.update} changes",
            ),
            (
                golden and buffer.golden_pairing != "prompt",
                "takes the golden solution of the very prompt: set buffer.golden_pairing=prompt, or leave golden "
                "rollouts out",
            ),
            (
                golden and loss.golden.divergence != "cross_entropy",
                "puts golden solutions in the place of the teacher: loss.golden.divergence must be cross_entropy",
            ),
            (
                loss.advantage.reward_coef > 0 and (self.rollout.temperature != 1 or self.rollout.top_p < 1),
                "leaves prompts to the reward, which needs rollout.temperature=1 and rollout.top_p=1",
            ),
        ):
            if wrong:
                raise ValueError(f"buffer.evidence {what}")

    def _check_sampling(self) -> None:
        """What the estimators assume of the rollouts."""
        student, reference, rollout = self.loss.student, self.loss.reference, self.rollout
        correction, pushed = self.loss.importance.correction, self.loss.loop_advantage
        for field, used, instead in (
            (
                f"student.divergence={student.divergence}",
                student.used and student.divergence in ON_STUDENT_SAMPLES,
                "a divergence on a support",
            ),
            (
                f"reference.estimator={reference.estimator}",
                reference.used and reference.needs_student_samples,
                "estimator=top_k or full",
            ),
            (f"importance.correction={correction}", correction != "none", "correction=none"),
            (f"loop_advantage={pushed}", bool(pushed), "0, which leaves loops out"),
        ):
            if used and (rollout.temperature != 1 or rollout.top_p < 1):
                raise ValueError(
                    f"loss.{field} estimates a mean over the student's own distribution: it needs "
                    f"rollout.temperature=1 and rollout.top_p=1 (or {instead})"
                )
        if self.loss.advantage.reward_coef > 0 and rollout.responses_per_prompt < 2:
            raise ValueError(
                "loss.advantage.reward_coef compares the responses to one prompt: "
                f"rollout.responses_per_prompt must be 2 or more, got {rollout.responses_per_prompt}"
            )

    def _check_ends(self) -> None:
        """Whether what ends responses before their budget may do so, and ever could."""
        rollout, detection = self.rollout, self.rollout.repetition_detection
        if rollout.horizon is not None and not self.may_shorten:
            asks = "buffer.evidence judges" if self.buffer.evidence else "loss.advantage.reward_coef rewards"
            raise ValueError(f"{asks} whole responses: rollout.horizon must be null")
        if rollout.horizon is not None and not self.uses_student:
            raise ValueError("rollout.horizon cuts student rollouts off, but there are none: it must be null")
        if self.loss.loop_advantage is not None and not (detection and self.uses_student):
            lacks = "there are no student rollouts" if detection else "rollout.repetition_detection is null"
            raise ValueError(
                f"loss.loop_advantage={self.loss.loop_advantage} is of student rollouts that "
                f"rollout.repetition_detection ends, but {lacks}; leave it out, or set that"
            )
        longest = max([rollout.longest_response, *(each.max_tokens for each in self.evaluation_sets.values())])
        if detection and (fewest := detection.min_pattern_size * detection.min_count) >= longest:
            raise ValueError(
                f"rollout.repetition_detection ends nothing before its budget: min_pattern_size × min_count = {fewest} "
                f"tokens, but no response has more than {longest}; lower one of the two"
            )

    def _check_scorers(self) -> None:
        """What is asked of teachers and reference, and what they can give."""
        reference, terms = self.loss.reference, [(source, self.loss.terms[source]) for source in self.sources]
        asked = {
            f"loss.{source}.support={term.support}": self.teachers
            for source, term in terms
            if term.on_distributions and term.support != "teacher_top_k"
        }
        if reference.used and reference.estimator == "full" and not self.learner_is_reference:
            asked["loss.reference.estimator=full"] = {"reference": self.reference}
        for field, scorers in asked.items():
            for name, scorer in scorers.items():
                if scorer.may_choose_tokens and not field.endswith("=full"):
                    continue
                if scorer.engine != "torch" or scorer.url:
                    raise ValueError(
                        f"{field} needs {name}.engine=torch: vLLM gives no hidden states, and log-probs of chosen "
                        "tokens on GPUs alone (gpus_per_actor)"
                    )
                if scorer.follows_student and field.endswith("=full"):
                    raise ValueError(
                        f"{name}.update={scorer.update} cannot be compared with {field}: the learner keeps the output "
                        "layer that the run began with; compare on a top-k"
                    )
        for name in {"teacher", "student", "reference"} & self.more_teachers.keys():
            raise ValueError(f"more_teachers: the name '{name}' is taken; choose another")
        for name, teacher in self.teachers.items():
            if teacher.privileged and self.data.golden is None:
                raise ValueError(f"{name}.privileged shows golden solutions, but data.golden is null")
        for name, scorer in {**self.teachers, "reference": self.reference}.items():
            if scorer.follows_student and self.weight_backend == "nccl" and scorer.gpus_per_actor == 0:
                raise ValueError(
                    f"{name}.update={scorer.update} joins the broadcast, which is nccl here and needs a GPU: "
                    f"set {name}.gpus_per_actor, or weights.backend=gloo"
                )

    @property
    def told_loops(self) -> RepetitionRule | None:
        """The rule of the loops whose repeats the loss tells apart; None where it does not."""
        return None if self.loss.loop_advantage is None else self.rollout.repetition_rule

    @property
    def loads_golden(self) -> bool:
        """Are golden rollouts trained on, or kept at hand for the guard?"""
        guard_may_mix = self.guard.level not in ("off", "warn") and self.guard.max_golden_per_prompt > 0
        return self.buffer.uses_golden or (guard_may_mix and self.uses_student and self.data.golden is not None)

    @property
    def may_shorten(self) -> bool:
        """May the student's rollouts be cut off before their budget? A verdict needs whole ones."""
        return self.loss.advantage.reward_coef == 0 and self.buffer.evidence is None

    @property
    def uses_student(self) -> bool:
        """Does the student sample rollouts?"""
        return self.buffer.prompts_per_step > 0 and self.rollout.responses_per_prompt > 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """What a step may train on."""
        buffer = self.buffer
        there = {"student": self.uses_student, "golden": buffer.uses_golden, "teacher": buffer.uses_teacher_rollouts}
        return tuple(source for source, used in there.items() if used)

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name."""
        return {"teacher": self.teacher, **self.more_teachers}

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """Role to configuration of the scorer pools that a run starts: teachers by their names, and "reference"."""
        teachers = self.teachers if self.uses_teacher else {}
        starts_reference = self.uses_reference and not self.learner_is_reference
        return {**teachers, **({"reference": self.reference} if starts_reference else {})}

    @property
    def learner_is_reference(self) -> bool:
        """Is the reference the student without its adapters, which the learner holds anyway?"""
        reference = self.reference
        own = reference.path in (STUDENT, self.student.path) and not (reference.follows_student or reference.url)
        return own and self.student.lora is not None

    def needs_teacher(self, source: Source) -> bool:
        """Does the loss of this source compare with a teacher?"""
        term = self.loss.terms[source]
        if term.divergence == "k1":
            return term.used and self.loss.advantage.uses_teacher
        return term.used and term.divergence != "cross_entropy"

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
        """The least that the mixture and the KL to the reference amount to at any step: where the guard counts from."""
        return Strength(
            golden_per_prompt=schedule.lowest(self.buffer.golden_per_prompt) if self.buffer.uses_golden else 0.0,
            golden_coef=schedule.lowest(self.loss.golden.coef),
            reference_kl_coef=schedule.lowest(self.loss.reference.coef),
            mask_truncated_tails=self.loss.mask_truncated_tails,
        )

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """What is evaluated: sets by name, with nothing left to defaults but num_problems. Empty where nothing is."""
        of_all, longest = self.evaluation, self.rollout.longest_response
        if of_all.num_problems == 0:
            return {}
        held_out = EvaluationSet(path=self.data.evaluation, greedy=True, num_problems=of_all.num_problems)
        return {
            name: dataclasses.replace(
                each, temperature=each.temperature or of_all.temperature, max_tokens=each.max_tokens or longest
            )
            for name, each in (of_all.sets or {HELD_OUT: held_out}).items()
        }

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
            return "grpo" if self.loss.advantage.reward_coef > 0 else "opsa"
        if self.buffer.on_policy_probability is not None:
            return "gkd"
        mixture, evidence = len(self.sources) > 1, "+evidence" if self.buffer.evidence else ""
        if mixture and self.loss.reference.used:
            return "stableopd" + evidence
        more = ("+mixture" if mixture else "") + ("+reference_kl" if self.loss.reference.used else "")
        return "opd" + more + evidence

    @property
    def repetition(self) -> tuple[int, float]:
        """(L, τ) of rep(o). A loop of 30 characters shrinks to 30 + 15 bytes: by 4 in 200 characters, by 11 in 500;
        prose by 1.5 there and by 2.5 in 10 000. τ = 10 (L / 10 000)^.32 passes between the two, and through the
        paper's 10 and the 1.7 that was calibrated at 40 characters."""
        metrics = self.metrics
        window = metrics.repetition_window_chars or min(10_000, max(40, 2 * self.rollout.longest_response))
        return window, metrics.repetition_ratio or 10 * (window / 10_000) ** 0.32

    @property
    def weight_backend(self) -> str:
        automatic = "nccl" if self._on_gpus and not self._may_share_devices else "gloo"
        return automatic if self.weights.backend == "auto" else self.weights.backend

    @property
    def _on_gpus(self) -> bool:
        """Have both ends of the broadcast GPUs?"""
        return self.learner.gpus_per_rank > 0 and self.rollout.gpus_per_generator > 0

    @property
    def _may_share_devices(self) -> bool:
        """May two members of the broadcast be on one GPU?"""
        followers = [each for each in self.scorers.values() if each.follows_student]
        return may_share_a_device(
            [
                (1, self.learner.gpus_per_rank),  # rank 0 alone sends
                (self.rollout.size.maximum, self.rollout.gpus_per_generator),
                *((each.num_actors, each.gpus_per_actor) for each in followers),
            ]
        )
