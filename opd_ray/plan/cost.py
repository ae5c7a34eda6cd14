"""How long a run takes and what it costs, from what a probe measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from opd_ray.config import Config
from opd_ray.plan.probe import Probe


@dataclass(frozen=True)
class Cost:
    """Seconds of a whole run, by what they go to."""

    start_s: float
    steps_s: float
    evaluations_s: float

    @property
    def hours(self) -> float:
        return (self.start_s + self.steps_s + self.evaluations_s) / 3600


def cost(config: Config, probe: Probe) -> Cost:
    """Every problem of an evaluation is answered twice, greedy and sampled, at the rate of the generators' own work."""
    generators = next(room for room in probe.rooms if room.room == "generate")
    rate = generators.tokens_per_s * generators.workers
    evaluation, steps = config.evaluation, config.learner.steps
    during = (steps - 1) // evaluation.every_steps if evaluation.every_steps and evaluation.num_problems else 0
    answers = 2 * (2 * evaluation.num_problems + during * evaluation.num_problems_during)
    evaluations = answers * probe.step.response_tokens / rate if rate else 0.0
    return Cost(probe.start_s, steps * probe.step_s, evaluations)
