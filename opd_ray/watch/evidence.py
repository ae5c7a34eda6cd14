"""What steps say about a share (of rollouts, of tokens), and how sure that is: windows, the normal level, its error.

As on a control chart: the first steps give the normal level of a run and how much steps scatter around it, and a
window is judged by its distance from there. Only a level that is lower beyond its error replaces the normal one. The
lowest window mean that a run has shown would be no such measure: the minimum of many noisy means lies below the level
that they are of, and a healthy run would cross every threshold that is counted from it sooner or later.

The scatter is that between steps, which has all that makes rollouts less than independent: four of one prompt, shares
by tokens in which one long rollout weighs as much as ten. It is kept as the ratio to a binomial's variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW_ROLLOUTS = 320
MOST_ERRORS = 5.1
"""Standard errors: .1 % over 500 steps of three shares in three windows, shared out evenly (Bonferroni)."""
_NORMAL_ROLLOUTS, _NORMAL_STEPS = 32 * WINDOW_ROLLOUTS, 100
_PRIOR_RATIO, _PRIOR_STEPS = 4.0, 20
"""The ratio to the binomial's variance before steps tell, as of four equal rollouts a prompt, and its weight."""


@dataclass(frozen=True)
class Windows:
    """Steps of the windows: a collapse fills the short one first, a slow rise is only seen in the long one."""

    short: int
    middle: int
    long: int
    rollouts: int
    """Of one step."""

    @classmethod
    def of(cls, rollouts_per_step: int) -> Windows:
        rollouts = max(1, rollouts_per_step)
        return cls(*(math.ceil(WINDOW_ROLLOUTS / part / rollouts) for part in (4, 2, 1)), rollouts)


@dataclass
class Share:
    """One share: its last steps as [weight, value], and sums over the steps that are its normal level."""

    steps: list[list[float]] = field(default_factory=list)
    normal: list[float] = field(default_factory=lambda: [0.0] * 6)
    """Number of steps; sums of w, w x, w², w² x, w² x²: all that the ratio estimator and its variance need."""
    num_quiet: int = 0
    """Steps in a row at which nothing was amiss."""
    told_beginning: bool = False
    part: list[float] = field(default_factory=lambda: [0.0] * 3)
    """Of a step that is not whole yet: the share of its rollouts, and sums of w and w x."""

    def add(self, value: float, weight: float, windows: Windows, share: float = 1.0) -> bool:
        """Takes a step in, of which only a ``share`` of the rollouts was measured: several such steps are one. Is a
        step whole with it?"""
        new = (share, share * max(weight, 1e-9), share * max(weight, 1e-9) * value)
        self.part = [old + each for old, each in zip(self.part, new, strict=True)]
        measured, w, wx = self.part
        if measured < 1 - 1e-6:
            return False
        self.steps.append([w / measured, wx / w])
        del self.steps[: -windows.long - 1]
        self.part = [0.0] * 3
        return True

    def forget(self) -> None:
        """The windows begin anew, the normal level stays."""
        self.steps, self.part, self.told_beginning = [], [0.0] * 3, True

    def mean(self, steps: int) -> float:
        """Over the last ``steps`` steps: the ratio of sums, not the mean of ratios."""
        weights = weighed = 0.0
        for w, x in self.steps[-steps:]:
            weights += w
            weighed += w * x
        return weighed / weights

    def level(self) -> float:
        return self.normal[2] / self.normal[1] if self.normal[0] else 0.0

    def above_level(self, threshold: float) -> float:
        """Where a threshold of a run whose normal level is 0 stands in this one."""
        return self.level() + (1 - self.level()) * threshold

    def known(self, windows: Windows) -> bool:
        """Whether the normal level is that of a short window at least, so that there is something to compare with."""
        return self.normal[0] >= windows.short

    def tells(self, windows: Windows) -> bool:
        """Whether there is a level to compare with and a window to compare."""
        return self.known(windows) and len(self.steps) >= windows.short

    def worst(self, thresholds: Sequence[float], windows: Windows) -> float | None:
        """The mean over the window that is over most of the ``thresholds`` and differs from the normal level beyond
        chance, of such windows the shortest; None where none is over any."""
        worst, most = None, 0
        for steps in dict.fromkeys((windows.short, windows.middle, windows.long)):
            if steps > len(self.steps):
                break
            mean = self.mean(steps)
            crossed = sum(mean > each for each in thresholds)
            if crossed > most and self._differs(mean, steps, windows.rollouts):
                worst, most = mean, crossed
        return worst

    def _differs(self, mean: float, steps: int, rollouts_per_step: int) -> bool:
        """Whether the mean over ``steps`` steps is further from the normal level than chance takes it."""
        count = self.normal[0]
        rollouts = count * rollouts_per_step
        level = (self.level() * rollouts + 1) / (rollouts + 2)  # a share of 0 in so many rollouts is not certainly 0
        independent = rollouts_per_step / self._ratio(level, rollouts_per_step) / (1 / steps + 1 / count)
        return _errors(mean, level, independent) > MOST_ERRORS

    def _ratio(self, level: float, rollouts_per_step: int) -> float:
        """How many times as much as those of independent rollouts the steps scatter."""
        count, w, _, ww, wwx, wwxx = self.normal
        if count < 2:
            return _PRIOR_RATIO
        squares = max(0.0, wwxx - 2 * self.level() * wwx + self.level() ** 2 * ww) * (count / w) ** 2
        seen = squares / (count - 1) * rollouts_per_step / (level * (1 - level))
        told = min(count, self.level() * count * rollouts_per_step)  # steps without any tell nothing of the scatter
        return max(1.0, (_PRIOR_STEPS * _PRIOR_RATIO + told * seen) / (_PRIOR_STEPS + told))

    def learn(self, windows: Windows, *, quiet: bool) -> None:
        """Takes the step that has just left the short window into the normal level, while that is young and nothing
        was amiss since that step came; a level that is lower beyond its error begins a new one."""
        self.num_quiet = self.num_quiet + 1 if quiet else 0
        if self.known(windows):
            for steps in (each for each in (windows.short, windows.long) if each <= len(self.steps)):
                mean = self.mean(steps)
                if mean < self.level() and self._differs(mean, steps, windows.rollouts):
                    self.normal = [0.0] * 6
                    for w, x in self.steps[-steps:]:
                        self._count(w, x)
                    return
        count = self.normal[0]
        young = count < _NORMAL_STEPS or count * windows.rollouts < _NORMAL_ROLLOUTS
        if self.num_quiet > windows.short and young and len(self.steps) > windows.short:
            self._count(*self.steps[-windows.short - 1])

    def begins_beyond(self, threshold: float, windows: Windows) -> bool:
        """Once: whether the run's first steps, a long window at most, are over ``threshold`` beyond error."""
        if self.told_beginning or len(self.steps) > windows.long:
            self.told_beginning = True
            return False
        mean, independent = self.mean(len(self.steps)), windows.rollouts * len(self.steps) / _PRIOR_RATIO
        self.told_beginning = mean > threshold and _errors(mean, threshold, independent) > MOST_ERRORS
        return self.told_beginning

    def _count(self, w: float, x: float) -> None:
        new = (1.0, w, w * x, w * w, w * w * x, w * w * x * x)
        self.normal = [old + each for old, each in zip(self.normal, new, strict=True)]


def _errors(mean: float, level: float, independent: float) -> float:
    """How many standard errors ``mean`` is from ``level``, by the root of the likelihood ratio: where a share is small
    and the rollouts few, means are so skewed that a distance over a standard error takes chance for evidence."""
    mean = min(max(mean, 0.0), 1.0)
    level = min(max(level, 1e-9), 1 - 1e-9)
    divergence = mean * math.log(mean / level) if mean else 0.0
    divergence += (1 - mean) * math.log((1 - mean) / (1 - level)) if mean < 1 else 0.0
    return math.sqrt(2 * independent * max(0.0, divergence))
