"""What came of the arms of a study, as rows and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opd_ray.study.arms import Arm, _summary


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm's outcome over its seeds, in the order of the seeds."""

    arm: str
    seeds: tuple[int, ...]
    sampled: tuple[float, ...]
    greedy: tuple[float, ...]
    truncated: tuple[float, ...]
    max_truncation: tuple[float, ...]
    trained_tokens: tuple[float, ...]
    wall_s: tuple[float, ...]


def outcomes(directory: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Row]:
    """A row per arm that has finished runs."""
    rows = []
    for arm in arms:
        found = {seed: _summary(directory, arm, seed) for seed in seeds}
        there = {seed: summary for seed, summary in found.items() if summary and summary["eval_after"]}
        if not there:
            continue
        after = [summary["eval_after"] for summary in there.values()]
        rows.append(
            Row(
                arm.name,
                tuple(there),
                tuple(each["accuracy_sampled"] for each in after),
                tuple(each["accuracy_greedy"] for each in after),
                tuple(each["truncation_rate"] for each in after),
                tuple(summary["max_truncation_rate"] for summary in there.values()),
                tuple(summary["trained_tokens"] for summary in there.values()),
                tuple(summary["wall_s"] for summary in there.values()),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: mean ± standard deviation over seeds, and each seed's value."""
    head = ("arm", "sampled accuracy", "greedy accuracy", "truncated after", "highest truncation in training", "tokens")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        tokens = f"{np.mean(row.trained_tokens) / 1000:.0f} k"
        cells = [row.arm, *map(_spread, (row.sampled, row.greedy, row.truncated, row.max_truncation)), tokens]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    each = " ".join(f"{value:.2f}".removeprefix("0") if value < 1 else "1" for value in values)
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation} [{each}]"
