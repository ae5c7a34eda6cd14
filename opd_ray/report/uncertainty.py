"""How sure a mean over seeds is, and what seeds say about a difference: exact, without assumptions about its shape.

Seeds are students; a difference between two arms is taken on each, which pairs away what a lucky student brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""Of the two-sided tests; intervals have the rest."""
_ENUMERATED = 16
"""Seeds whose signs are all gone through; of more, so many drawings as that takes."""


@dataclass(frozen=True)
class Location:
    """Where the centre of some values lies, against a limit; the values scatter around it symmetrically."""

    mean: float
    p: float
    """Two-sided, of a centre that is the limit."""
    low: float
    """Of the interval; infinite where there are too few values for its level (six are enough)."""
    high: float


def location(values: Sequence[float], limit: float = 0.0) -> Location:
    """The sign-flip (paired permutation) test on a mean, and the interval of all centres that it would not reject.

    Flipping the signs of a subset of the deviations from a centre c raises their mean where the subset's own mean is
    below c, so that all centres are tested at once by the means of the 2ⁿ − 1 subsets (typical values; Hartigan 1969,
    JASA 64).
    """
    means = _subset_means(np.asarray(values, float)).round(12)  # equal ones are, however they were added up
    number = len(means) + 1
    below, above = ((1 + int(found)) / number for found in ((means <= limit).sum(), (means >= limit).sum()))
    # The least interval that leaves out what is rejected on either side with half of the level.
    outside = math.floor(LEVEL / 2 * number)
    low, high = (float(means[outside - 1]), float(means[-outside])) if outside else (-math.inf, math.inf)
    return Location(float(np.mean(values)), min(1.0, 2 * min(below, above)), low, high)


def _subset_means(values: np.ndarray) -> np.ndarray:
    """[2ⁿ − 1] means of the non-empty subsets, from the lowest to the highest."""
    if len(values) > _ENUMERATED:
        drawn = np.random.default_rng(0).integers(0, 2, (2**_ENUMERATED - 1, len(values)))
        return np.sort(drawn @ values / np.maximum(1, drawn.sum(axis=1)))
    sums, sizes = np.zeros(1), np.zeros(1)
    for value in values:
        sums, sizes = np.concatenate([sums, sums + value]), np.concatenate([sizes, sizes + 1])
    return np.sort(sums[1:] / sizes[1:])


def proportion(count: int, number: int) -> Location:
    """Of ``count`` cases in ``number``, against one half: the exact binomial test, Clopper and Pearson's interval."""
    p = min(1.0, 2 * min(_at_least(count, number, 0.5), _at_least(number - count, number, 0.5)))
    low = _solve(lambda chance: _at_least(count, number, chance)) if count else 0.0
    high = 1 - _solve(lambda chance: _at_least(number - count, number, chance)) if count < number else 1.0
    return Location(count / number, p, low, high)


def _at_least(count: int, number: int, chance: float) -> float:
    return sum(math.comb(number, k) * chance**k * (1 - chance) ** (number - k) for k in range(count, number + 1))


def _solve(tail: Callable[[float], float]) -> float:
    """The chance at which a rising tail is half of the level."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) < LEVEL / 2 else (low, middle)
    return low


def error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of some values; there is none for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def over_problems(answers: np.ndarray) -> float:
    """[seeds, problems]: what the choice of problems adds to the standard error of the mean, beside that of the seeds.
    What scatters in a single answer counts in both, so that the two together err on the large side."""
    return error(answers.mean(axis=0)) or 0.0
