"""What a step consists of: how many rollouts of which source, and with which weights in the objective.

Pure functions of the configuration and the step (and of what the guard asks for), so that a run that resumes
composes the same steps.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.config import Config, schedule
from opd_ray.messages import Coefficients, Entry, Strength

NO_STRENGTH = Strength()


@dataclass(frozen=True)
class StepMix:
    """The composition of one step."""

    student_per_prompt: int
    """Responses that the student samples for each of the step's prompts."""
    num_teacher_written: int
    """Responses that the teacher samples, spread evenly over the step's prompts."""
    num_golden: int

    def teacher_written(self, index: int, num_prompts: int) -> int:
        """How many of them are to the step's prompt ``index``: as even as integers allow."""
        return self.num_teacher_written * (index + 1) // num_prompts - self.num_teacher_written * index // num_prompts


class Mixture:
    """Composes steps as ``buffer.*`` and ``rollout.responses_per_prompt`` say."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def at(self, step: int, strength: Strength = NO_STRENGTH) -> StepMix:
        """The composition of a 0-based step."""
        buffer = self._config.buffer
        prompts = buffer.prompts_per_step
        per_prompt = max(schedule.at(buffer.golden_per_prompt, step), strength.golden_per_prompt)
        num_golden = round(prompts * per_prompt) + buffer.golden_per_step
        num_teacher_written = round(prompts * schedule.at(buffer.teacher_per_prompt, step))
        responses = self._config.rollout.responses_per_prompt if prompts else 0
        if buffer.on_policy_probability is None:
            return StepMix(responses, num_teacher_written, num_golden)
        if self._is_on_policy(step):
            # What the guard asks for is asked of the steps that the student samples for.
            return StepMix(responses, 0, round(prompts * strength.golden_per_prompt))
        return StepMix(0, num_teacher_written, num_golden)

    def coefficients(self, step: int, strength: Strength = NO_STRENGTH) -> Coefficients:
        """The weights of the objective's terms at a 0-based step."""
        loss = self._config.loss
        return Coefficients(
            student=schedule.at(loss.student.coef, step),
            golden=max(schedule.at(loss.golden.coef, step), strength.golden_coef),
            teacher=schedule.at(loss.teacher.coef, step),
            reference=max(schedule.at(loss.reference.coef, step), strength.reference_kl_coef),
            mask_truncated_tails=loss.mask_truncated_tails or strength.mask_truncated_tails,
        )

    def composition(self, step: int, entries: Sequence[Entry], strength: Strength) -> dict[str, float]:
        """What a step was made of, and with which weights, as metrics."""
        trained = [entry.meta.source for entry in entries if entry.is_trained_on]
        counts = dict.fromkeys(self._config.sources, 0) | Counter(trained)
        numbers = {f"{source}_rollouts": float(number) for source, number in counts.items()}
        if "teacher" in self._config.sources:
            numbers["teacher_left_out"] = float(self.at(step).num_teacher_written - counts["teacher"])
        coefficients = dataclasses.asdict(self.coefficients(step, strength))
        del coefficients["mask_truncated_tails"]
        return numbers | {f"{name}_coef": float(value) for name, value in coefficients.items()}

    def _is_on_policy(self, step: int) -> bool:
        probability = schedule.at(self._config.buffer.on_policy_probability, step)
        return bool(np.random.default_rng([self._config.seed, 2, step]).random() < probability)
