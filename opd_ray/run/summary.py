"""What summary.json says, added up step by step."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.evaluation.scores import Evaluation
from opd_ray.watch.observers import StepReport

SUMMARY = "summary.json"
"""Name of the file in the run directory."""
_MEASURED = ("learner/train_s", "learner/weight_sync_s", "staleness/mean", "staleness/max")
_MOST_EVENTS = 100
"""Of the guard's warnings and actions, the first and the last that are kept; what ended an attempt is always."""
_SAMPLE = 4096
"""Values that a median is taken of; of more it is an estimate."""


class Measured:
    """What there is to say of one metric after any number of steps."""

    def __init__(self) -> None:
        self.count, self.sum, self.max = 0, 0.0, 0.0
        self._sample: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self.count, self.sum, self.max = self.count + 1, self.sum + value, max(self.max, value)
        if len(self._sample) < _SAMPLE:
            self._sample.append(value)
        elif (at := self._random.randrange(self.count)) < _SAMPLE:
            self._sample[at] = value

    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def median(self) -> float:
        return float(np.median(self._sample)) if self._sample else 0.0


class Summary:
    """Adds up what summary.json reports; its clock starts when it is made, just before the first step.

    However many steps there are, it stays small. ``state`` goes into checkpoints and makes a resumed run's summary that
    of the whole run; what is not in it (throughput, staleness, weight sync) is that of the last start.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._began = time.monotonic()
        self._measured = {name: Measured() for name in _MEASURED}
        self._rollout_tokens = 0
        before = state or {}
        self._events: list[dict[str, Any]] = list(before.get("guard_events", []))
        # Checkpoints of older releases count no events.
        self._event_counts = Counter(before.get("guard_event_counts", map(_kind, self._events)))
        self._max_truncation_rate = float(before.get("max_truncation_rate", 0.0))
        self._trained_tokens = int(before.get("trained_tokens", 0))
        self._saved_tokens = int(before.get("saved_tokens", 0))
        self._earlier_s = float(before.get("wall_s", 0.0))
        self._eval_before = before.get("eval_before")
        self.restarts = Counter(before.get("restarts", {}))
        """Workers that were replaced, by room; whoever replaces one counts it here."""

    @property
    def evaluated_before(self) -> Evaluation | None:
        """The student's evaluation before the first step, where an earlier start of this run has made it."""
        return Evaluation.of(self._eval_before) if self._eval_before else None

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """The steps after a snapshot's ``state`` (None: all) are undone: their tokens no longer count as trained."""
        self._trained_tokens = int((state or {}).get("trained_tokens", 0))

    def begin(self, before: Evaluation | None) -> None:
        """Notes the evaluation before the first step."""
        self._eval_before = before.saved() if before else None

    async def on_step(self, report: StepReport) -> None:
        for name, measured in self._measured.items():
            if name in report.metrics:
                measured.add(report.metrics[name])
        for event in report.events:
            self._note(asdict(event))
        truncated = report.metrics.get("rollouts/truncation_rate", 0.0)
        self._max_truncation_rate = max(self._max_truncation_rate, truncated)
        self._saved_tokens += int(report.metrics.get("rollouts/saved_tokens", 0))
        for entry in report.entries:
            self._trained_tokens += entry.meta.num_trained_tokens if entry.is_trained_on else 0
            self._rollout_tokens += entry.meta.num_response_tokens if entry.meta.source == "student" else 0

    def _note(self, event: dict[str, Any]) -> None:
        self._event_counts[_kind(event)] += 1
        self._events.append(event)
        # Neither of the first nor, from now on, of the last. Those that ended an attempt are few: guard.max_rollbacks.
        oldest = len(self._events) - _MOST_EVENTS - 1
        if oldest >= _MOST_EVENTS and self._events[oldest]["level"] not in ("rollback", "stop"):
            del self._events[oldest]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "guard_events": list(self._events),
            "guard_event_counts": dict(self._event_counts),
            "max_truncation_rate": self._max_truncation_rate,
            "trained_tokens": self._trained_tokens,
            "saved_tokens": self._saved_tokens,
            "wall_s": self._earlier_s + time.monotonic() - self._began,
            "eval_before": self._eval_before,
            "restarts": dict(self.restarts),
        }

    def result(self, config: Config, after: Evaluation | None) -> dict[str, Any]:
        wall = time.monotonic() - self._began
        train, sync, mean, oldest = self._measured.values()
        return self.state() | {
            "method": config.method,
            "name": config.name or config.method,
            "seed": config.seed,
            "steps": config.learner.steps,
            "rollout_tokens": self._rollout_tokens,
            "tokens_per_s": self._rollout_tokens / wall,
            "learner_idle_share": 1 - (train.sum + sync.sum) / wall,
            "weight_sync_s": {"p50": sync.median(), "max": sync.max},
            "staleness": {"mean": mean.mean(), "max": oldest.max},
            "eval_after": after.saved() if after else None,
            "restarts": self.restarts.total(),
            "restarts_by_room": dict(self.restarts),
        }


def _kind(event: Mapping[str, Any]) -> str:
    return f"{event['level']} {event['signal']}"


def outcome(summary: Mapping[str, Any]) -> str:
    """What a run that ended came to, in a few words."""
    before, after = summary.get("eval_before"), summary.get("eval_after")
    took = f"{summary['wall_s']:.0f} s"
    if not before or not after:
        return took
    return f"sampled accuracy {before['accuracy_sampled']:.3f} -> {after['accuracy_sampled']:.3f}, {took}"
