"""metrics.jsonl as the report reads it: line by line into plain numbers, and of a long run no more points than can be
drawn.

Of a metric with more than MOST_POINTS measurements every second is kept, every fourth, and so on, so that means stay
what they are; and besides them its lowest, its highest and its last ones.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.errors import InputError

Metrics = dict[str, dict[int, float]]
"""Metric name to step to value, steps in order."""

EVALUATION = "evaluation/"
SUMMED = ("learner/trained_tokens", "rollouts/tokens", "throughput/step_s")
SO_FAR = " so far"
"""Ends the name of the sum of all measurements up to a step, of what is SUMMED: what is kept of a long curve has its
extremes, too, and sums to something else."""
MOST_POINTS = 4096
_LAST = 16


def read_metrics(path: Path) -> tuple[Metrics, list[tuple[Metrics, int, int]], int]:
    """The way that counts; those abandoned, with the first and the last of their abandoned steps; and the number of
    damaged lines. A training step that is not later than the one before marks an abandoned way.

    Evaluations stand on lines of their own, behind the step they belong to, and mark nothing. Raises InputError.
    """
    curves: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))  # step, value, step, value, …
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
                    points = np.array(curve).reshape(-1, 2)
                    curve[:] = array("d", points[points[:, 0] < step].tobytes())
            last = step
        for name, value in numbers.items():
            curves[name].extend((step, value))
    return _metrics(curves), abandoned, damaged


def _metrics(curves: Mapping[str, array[float]]) -> Metrics:
    found = {}
    for name, curve in curves.items():
        if curve:
            steps, values = _latest(np.array(curve).reshape(-1, 2))
            found[name] = _thinned(steps, values)
            if name in SUMMED:
                found[name + SO_FAR] = _thinned(steps, values.cumsum())
    return found


def _latest(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2] steps and values as measured, by step; of a step that was measured twice the latest counts."""
    steps, at = np.unique(points[::-1, 0], return_index=True)
    return steps, points[::-1, 1][at]


def _thinned(steps: np.ndarray, values: np.ndarray) -> dict[int, float]:
    stride = 1
    while len(steps) > stride * MOST_POINTS:
        stride *= 2
    kept = {*range(0, len(steps), stride), *range(len(steps))[-_LAST:], int(values.argmin()), int(values.argmax())}
    return {int(steps[i]): float(values[i]) for i in sorted(kept)}


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
