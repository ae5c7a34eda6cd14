"""The guard of a run."""

from __future__ import annotations

from opd_ray.config import Config, schedule
from opd_ray.watch.guard import Guard


def guard_of(config: Config) -> Guard:
    """As a configuration asks for it, before the first step."""
    buffer, loss = config.buffer, config.loss
    return Guard(
        config.guard,
        has_golden=config.loads_golden,
        has_reference=loss.reference.used,
        may_shorten=config.may_shorten,
        configured=config.least_strength,
        student_coef=schedule.highest(loss.student.coef),
        rollouts_per_step=buffer.prompts_per_step * config.rollout.responses_per_prompt,
        steps_ahead=buffer.max_staleness,
    )
