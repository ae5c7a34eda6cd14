"""The rate of every room and of the whole loop, after warm-up, in one run of the configured system.

    python jobs/bench_loop.py [--warmup N] [--steps N] [--config FILE] [section.field=value ...]

A room's rate is tokens per second of *its own work*: what it could do if nothing ever made it wait. The loop's rate
is tokens trained per second of wall clock. Memory is the proportional set size (PSS) of every
process of the run, Ray's own included, so shared pages count once.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.run.train import train
from opd_ray.watch.observers import StepReport

_ROOMS_OF_SOURCE = {"student": ["generate"], "golden": [], "teacher": ["teacher_generate"]}
"""Who makes the rollouts of a source."""


class PeakMemory:
    """Samples the memory of this process and of all its descendants until it is left.

    Rarely: the kernel walks every page of every process for it, which the rooms would feel.
    """

    def __init__(self, every_s: float = 15.0) -> None:
        self.peak_bytes = 0
        self._every_s, self._done = every_s, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, _processes())))


def _processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended between the listing and the look
        return 0


class Tokens:
    """Observer that counts the response tokens that each room had to do with, step by step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    async def on_step(self, report: StepReport) -> None:
        """Adds a step: by room, and all that were trained on as "learn"."""
        counts: Counter[str] = Counter()
        for entry in report.entries:
            rooms = [*_ROOMS_OF_SOURCE[entry.meta.source], *entry.scores, "learn"]
            counts.update(dict.fromkeys(rooms, entry.meta.num_response_tokens))
        self.steps.append(counts)


@click.command()
@click.option("--warmup", default=20, show_default=True, help="Steps that are not measured.")
@click.option("--steps", default=100, show_default=True, help="Steps that are measured.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; the embedded default without."
)
@click.argument("overrides", nargs=-1)
def main(warmup: int, steps: int, config_file: Path | None, overrides: tuple[str, ...]) -> None:
    """Measures the rooms and the loop."""
    fixed = [
        f"learner.steps={warmup + steps}",
        "guard.level=off",
        "evaluation.num_problems=0",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
        "metrics.rollout_log_every_steps=0",
    ]
    config = configs.load(config_file, [*overrides, *fixed])
    tokens = Tokens()
    with tempfile.TemporaryDirectory() as directory, PeakMemory() as memory:
        summary = train(config, Path(directory) / "bench", observers=(tokens,))
        lines = (Path(directory) / "bench" / "metrics.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, lines) if "throughput/step_s" in row][warmup:]
    _show(measured, sum(tokens.steps[warmup:], Counter()), memory.peak_bytes)
    if summary["restarts"]:
        lost = ", ".join(f"{count} of {room}" for room, count in summary["restarts_by_room"].items())
        click.echo(f"workers were lost and replaced meanwhile ({lost}): measure again", err=True)


def _show(measured: list[dict[str, Any]], tokens: Counter[str], peak_bytes: int) -> None:
    wall = sum(row["throughput/step_s"] for row in measured)
    table = Table("room", "tokens/s of its own work", "idle share", title="rooms", title_justify="left")
    for room in sorted(name.removeprefix("idle/") for name in measured[0] if name.startswith("idle/")):
        busy = sum((1 - row[f"idle/{room}"]) * row["throughput/step_s"] for row in measured)
        rate = f"{tokens[room] / busy:,.0f}" if tokens[room] else "-"
        table.add_row(room, rate, f"{1 - busy / wall:.2f}")
    console = Console()
    console.print(table)
    sync = median(row["learner/weight_sync_s"] for row in measured)
    rollouts = {
        source: sum(row.get(f"mixture/{source}_rollouts", 0) for row in measured) for source in _ROOMS_OF_SOURCE
    }
    composition = " + ".join(f"{count / len(measured):.0f} {source}" for source, count in rollouts.items() if count)
    console.print(
        f"loop: {tokens['generate'] / wall:,.0f} student tokens trained per second "
        f"({tokens['learn'] / wall:,.0f} of all sources), {wall / len(measured) * 1000:.0f} ms a step "
        f"of {composition} rollouts, over {len(measured)} steps"
    )
    console.print(f"weight sync: {sync * 1000:.0f} ms (median); peak memory {peak_bytes / 2**30:.1f} GiB (PSS)")


if __name__ == "__main__":
    main()
