"""Reads a run's rollout log the way anyone could, to count what was trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every row of every logged step, in order."""
    return [
        row for path in sorted((run_dir / "rollouts").glob("step-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def assert_each_prompt_once(run_dir: Path, *, steps: int, prompts_per_step: int, max_staleness: int) -> None:
    """Every step is there, every slot was trained on once and in its own step, every prompt once an epoch, and no
    token is older than allowed. Needs metrics.rollout_log_every_steps=1 and one response per prompt."""
    found = [row for row in rows(run_dir) if row["source"] == "student"]
    assert [row["step"] for row in found] == [step + 1 for step in range(steps) for _ in range(prompts_per_step)]
    assert sorted(row["slot"] for row in found) == list(range(steps * prompts_per_step))
    for row in found:
        assert row["slot"] // prompts_per_step == row["step"] - 1
        assert row["step"] - 1 - min(row["weight_versions"]) <= max_staleness
        assert max(row["weight_versions"]) < row["step"]
    prompts = len({row["prompt_id"] for row in found})
    epochs, rest = divmod(len(found), prompts)
    counts = Counter(Counter(row["prompt_id"] for row in found).values())
    assert counts == Counter({epochs: prompts - rest, epochs + 1: rest} if rest else {epochs: prompts})
