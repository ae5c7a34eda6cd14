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


@dataclass(frozen=True)
class StepMix:
    """The composition of one step."""

    student_per_prompt: int
    """Responses that the student samples for each of the step's prompts."""
    num_teacher: int
    """Responses that the teacher samples, spread evenly over the step's prompts."""
    num_golden: int

    def teacher_responses(self, index: int, num_prompts: int) -> int:
        """Teacher responses to the step's prompt ``index``: num_teacher in all, as even as integers allow."""
        return self.num_teacher * (index + 1) // num_prompts - self.num_teacher * index // num_prompts


class Mixture:
    """Composes steps as ``buffer.*`` and ``rollout.responses_per_prompt`` say."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def at(self, step: int, strength: Strength | None = None) -> StepMix:
        """The composition of a 0-based step."""
        buffer = self._config.buffer
        prompts = buffer.prompts_per_step
        per_prompt = schedule.at(buffer.golden_per_prompt, step)
        if strength is not None:
            per_prompt = max(per_prompt, strength.golden_per_prompt)
        num_golden = round(prompts * per_prompt) + buffer.golden_per_step
        num_teacher = round(prompts * schedule.at(buffer.teacher_per_prompt, step))
        responses = self._config.rollout.responses_per_prompt if prompts else 0
        if buffer.on_policy_probability is None:
            return StepMix(responses, num_teacher, num_golden)
        if self._is_on_policy(step):
            # What the guard asks for is asked of the steps that the student samples for.
            guarded = round(prompts * strength.golden_per_prompt) if strength is not None else 0
            return StepMix(responses, 0, guarded)
        return StepMix(0, num_teacher, num_golden)

    def coefficients(self, step: int, strength: Strength | None = None) -> Coefficients:
        """The weights of the objective's terms at a 0-based step."""
        loss = self._config.loss
        golden, reference = schedule.at(loss.golden.coef, step), schedule.at(loss.reference.coef, step)
        masked = loss.mask_truncated_tails
        if strength is not None:
            golden = max(golden, strength.golden_coef)
            reference = max(reference, strength.reference_kl_coef)
            masked = masked or strength.mask_truncated_tails
        return Coefficients(
            student=schedule.at(loss.student.coef, step),
            golden=golden,
            teacher=schedule.at(loss.teacher.coef, step),
            reference=reference,
            mask_truncated_tails=masked,
        )

    def composition(self, step: int, entries: Sequence[Entry], strength: Strength) -> dict[str, float]:
        """What a step was made of, and with which weights, as metrics."""
        counts = dict.fromkeys(self._config.sources, 0) | Counter(entry.meta.source for entry in entries)
        left_out = self.at(step).num_teacher - counts.get("teacher", 0)
        coefficients = dataclasses.asdict(self.coefficients(step, strength))
        numbers = {f"{source}_rollouts": float(number) for source, number in counts.items()}
        if "teacher" in self._config.sources:
            numbers["teacher_left_out"] = float(left_out)
        return numbers | {
            f"{name}_coef": float(value) for name, value in coefficients.items() if name != "mask_truncated_tails"
        }

    def _is_on_policy(self, step: int) -> bool:
        probability = schedule.at(self._config.buffer.on_policy_probability, step)
        return bool(np.random.default_rng([self._config.seed, 2, step]).random() < probability)
