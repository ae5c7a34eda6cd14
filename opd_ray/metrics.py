"""What is measured on rollouts, and where measurements go.

One name, three places: ``rollouts/length`` in TensorBoard is ``ray_opd_rollouts_length`` on Ray's metrics
port, and ``rollouts/length`` in metrics.jsonl. Rates are shares of 1, times are seconds, log-probs nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from opd_ray.messages import RolloutMeta


def rollout_metrics(metas: Sequence[RolloutMeta], version: int, budget: int) -> dict[str, float]:
    """Metrics of the student rollouts that a step trains on; ``version`` is that of the weights it trains,
    ``budget`` the most tokens that a response could have."""
    if not metas:
        return {}
    lengths = np.array([meta.num_response_tokens for meta in metas])
    truncated = np.array([meta.truncated for meta in metas])
    oldest = np.array([meta.oldest_version for meta in metas])
    return {
        "rollouts/accuracy": float(np.mean([meta.correct for meta in metas])),
        "rollouts/truncation_rate": float(truncated.mean()),
        "rollouts/repetition_rate": float(np.mean([meta.repetitive for meta in metas])),
        "rollouts/truncated_token_share": float(lengths[truncated].sum() / lengths.sum()),
        "rollouts/periodic_tail_rate": float(np.mean([meta.tail_period > 0 for meta in metas])),
        "rollouts/length_budget": float(budget),
        "rollouts/length": float(lengths.mean()),
        "rollouts/length_p50": float(np.quantile(lengths, 0.5)),
        "rollouts/length_p95": float(np.quantile(lengths, 0.95)),
        "rollouts/behaviour_logprob": float(np.mean([meta.mean_behaviour_logprob for meta in metas])),
        "staleness/mean": float(version - np.average([meta.mean_version for meta in metas], weights=lengths)),
        "staleness/max": float(version - oldest.min()),
    }


def teacher_rollout_metrics(metas: Sequence[RolloutMeta]) -> dict[str, float]:
    """The same of the teacher's own rollouts that a step trains on, after the filter."""
    if not metas:
        return {}
    return {
        "teacher_rollouts/accuracy": float(np.mean([meta.correct for meta in metas])),
        "teacher_rollouts/truncation_rate": float(np.mean([meta.truncated for meta in metas])),
        "teacher_rollouts/repetition_rate": float(np.mean([meta.repetitive for meta in metas])),
        "teacher_rollouts/length": float(np.mean([meta.num_response_tokens for meta in metas])),
    }


class MetricsWriter:
    """Writes one step's metrics to TensorBoard, to Ray's metrics port and to metrics.jsonl."""

    def __init__(self, run_dir: Path, first_step: int = 0, *, continued: bool = False) -> None:
        """``continued``: the run went on from ``first_step``, and TensorBoard forgets what came after that before."""
        purge_step = first_step + 1 if continued else None
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self._lines = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` counts finished optimizer steps; values that are not finite are left out."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
            self._gauge(name).set(value)
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")

    def say(self, step: int, tag: str, text: str) -> None:
        """A sentence on TensorBoard's text page."""
        self._board.add_text(tag, text, step)

    def close(self) -> None:
        self._board.close()
        self._lines.close()

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge("opd_" + name.replace("/", "_"), description=f"opd_ray metric {name}")
        return self._gauges[name]
