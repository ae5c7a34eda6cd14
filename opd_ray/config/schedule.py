"""A number that may change over the steps of a run: constant, or straight lines between given points."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import AfterValidator

Points = tuple[tuple[int, float], ...]


def _check(schedule: float | Points) -> float | Points:
    if isinstance(schedule, tuple):
        steps = [step for step, _ in schedule]
        if not steps or steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError("expected a number or [[step, value], ...] with rising steps from 0 on")
    if lowest(schedule) < 0:
        raise ValueError("expected values of 0 or more")
    return schedule


Schedule = Annotated[float | Points, AfterValidator(_check)]
"""A number ≥ 0, or ``[[step, value], …]``: constant before the first and after the last point, straight between."""


def at(schedule: float | Points, step: int) -> float:
    """The value at a 0-based step."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    steps, values = zip(*schedule, strict=True)
    return float(np.interp(step, steps, values))


def highest(schedule: float | Points) -> float:
    """The largest value it ever takes: what must be provided for."""
    return max(value for _, value in schedule) if isinstance(schedule, tuple) else float(schedule)


def lowest(schedule: float | Points) -> float:
    """The smallest value it ever takes."""
    return min(value for _, value in schedule) if isinstance(schedule, tuple) else float(schedule)


def turns(*schedules: float | Points | None) -> list[int]:
    """The steps at which any of them may turn, the first step among them: between two of these all are straight."""
    return sorted({0}.union(*({step for step, _ in each} for each in schedules if isinstance(each, tuple))))
