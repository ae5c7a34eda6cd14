"""Recorder: writes the rollouts of a step to Parquet, so that payloads need not pass through the driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from opd_ray.messages import Entry
from opd_ray.node import this_node

_ROLES = ("teacher", "reference")


class Recorder:
    """Lives on the driver's node, where the run directory is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def node(self) -> str:
        return this_node()

    def write(self, step: int, entries: Sequence[Entry]) -> int:
        """Writes rollouts/step-N.parquet: the rollout columns, the step that trained on them, and the
        scorers' log-probs of the response tokens (null for golden rows). Returns the number of rows."""
        table = pa.Table.from_batches([self._row(entry) for entry in entries])
        table = table.add_column(0, "step", pa.array([step] * len(table), pa.int32()))
        target = self._directory / f"step-{step:06d}.parquet"
        partial = target.with_suffix(".tmp")
        pq.write_table(table, partial)
        partial.rename(target)
        return len(table)

    def _row(self, entry: Entry) -> pa.RecordBatch:
        row = ray.get(entry.rollouts).slice(entry.row, 1)
        for role in _ROLES:
            if role in entry.scores:
                column = ray.get(entry.scores[role]).slice(entry.row, 1)["logprobs"]
            else:
                column = pa.nulls(1, pa.list_(pa.float32()))
            row = row.append_column(pa.field(f"{role}_logprobs", pa.list_(pa.float32())), column)
        return row
