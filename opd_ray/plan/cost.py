"""How long a run takes, from what a probe measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd_ray.config import Config
from opd_ray.plan.rates import RoomRate


@dataclass(frozen=True)
class Cost:
    """Seconds of a whole run, by what they go to."""

    start_s: float
    steps_s: float
    evaluations_s: float

    @property
    def hours(self) -> float:
        return (self.start_s + self.steps_s + self.evaluations_s) / 3600


def cost(
    config: Config,
    problems: Mapping[str, int],
    generators: RoomRate,
    *,
    start_s: float,
    step_s: float,
    response_tokens: float,
) -> Cost:
    """Answers of evaluations are as long as rollouts, and written at the rate of the generators' own work.
    ``problems``: how many each set of ``config.evaluation_sets`` has."""
    steps, every = config.learner.steps, config.evaluation.every_steps
    during = (steps - 1) // every if every else 0
    answers = 0
    for name, each in config.evaluation_sets.items():
        whole = min(problems[name], each.num_problems or problems[name])
        asked = 2 * whole + during * min(problems[name], config.evaluation.num_problems_during)
        answers += asked * (each.samples + each.greedy)
    rate = generators.tokens_per_s * generators.workers
    return Cost(start_s, steps * step_s, answers * response_tokens / rate if rate else 0.0)
