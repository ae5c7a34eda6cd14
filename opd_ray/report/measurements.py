"""metrics.jsonl as the report reads it: line by line, and of a long run no more points than can be drawn.

Of a metric with more than MOST_POINTS measurements every second is kept, every fourth, and so on, so that means stay
what they are; and besides them its lowest, its highest and its last ones.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_ray.errors import InputError

Metrics = dict[str, dict[int, float]]
"""Metric name to step to value, steps in order."""

EVALUATION = "evaluation/"
MOST_POINTS = 4096
_LAST = 16


class _Curve:
    """One metric's measurements, thinned out as they come."""

    def __init__(self) -> None:
        self._points: dict[int, float] = {}
        self._count, self._stride = 0, 1
        self._last: deque[tuple[int, float]] = deque(maxlen=_LAST)
        self._low = self._high = (0, math.nan)

    def add(self, step: int, value: float) -> None:
        if step in self._points:
            self._points[step] = value
        else:
            if self._count % self._stride == 0:
                self._points[step] = value
                if len(self._points) > MOST_POINTS:
                    self._stride *= 2
                    self._points = dict(list(self._points.items())[::2])
            self._count += 1
        self._last.append((step, value))
        self._keep_extremes(step, value)

    def _keep_extremes(self, step: int, value: float) -> None:
        if not self._low[1] <= value:
            self._low = step, value
        if not self._high[1] >= value:
            self._high = step, value

    def cut(self, step: int) -> None:
        """Forgets what was measured from ``step`` on."""
        left = {at: value for at, value in self.points().items() if at < step}
        self._points = {at: value for at, value in self._points.items() if at < step}
        self._count = len(self._points) * self._stride
        self._last = deque(list(left.items())[-_LAST:], maxlen=_LAST)
        self._low = self._high = (0, math.nan)
        for at, value in left.items():
            self._keep_extremes(at, value)

    def points(self) -> dict[int, float]:
        """What is kept, by step."""
        if not self._last:
            return {}
        # An extreme that was measured anew at its step is none; what is kept of the step is the latest.
        return dict(sorted({**dict((self._low, self._high)), **self._points, **dict(self._last)}.items()))


def read_metrics(path: Path) -> tuple[Metrics, list[tuple[Metrics, int, int]], int]:
    """The way that counts; those abandoned, with the first and the last of their abandoned steps; and the number of
    damaged lines. A training step that is not later than the one before marks an abandoned way.

    Evaluations stand on lines of their own, behind the step they belong to, and mark nothing. Raises InputError.
    """
    curves: dict[str, _Curve] = {}
    abandoned: list[tuple[Metrics, int, int]] = []
    last, damaged, unread = -1, 0, 0
    for line in _lines(path):
        damaged, unread = damaged + unread, 0
        if line is None:
            unread = 1  # the last line may still be in writing
            continue
        step, numbers = line
        if not all(name.startswith(EVALUATION) for name in numbers):
            if step <= last:
                abandoned.append((_metrics(curves), step, last))
                for curve in curves.values():
                    curve.cut(step)
            last = step
        for name, value in numbers.items():
            curves.setdefault(name, _Curve()).add(step, value)
    return _metrics(curves), abandoned, damaged


def _metrics(curves: dict[str, _Curve]) -> Metrics:
    return {name: points for name, curve in curves.items() if (points := curve.points())}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float]] | None]:
    """Step and numbers of every line, None for one that is damaged."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for text in lines:
                try:
                    values = json.loads(text)
                    step = int(values["step"])
                except (ValueError, KeyError, TypeError):
                    yield None
                    continue
                yield step, {name: float(v) for name, v in values.items() if name != "step" and is_number(v)}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
