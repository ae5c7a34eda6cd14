"""The rate of every room and of the whole loop, after warm-up, in one run of the configured system.

    python jobs/bench_loop.py [--warmup N] [--steps N] [--config FILE] [--json FILE] [section.field=value ...]

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
from opd_ray.config import Config
from opd_ray.messages import SOURCES
from opd_ray.plan.rates import Tokens, measured
from opd_ray.run.train import train


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


@click.command()
@click.option("--warmup", default=20, show_default=True, help="Steps that are not measured.")
@click.option("--steps", default=100, show_default=True, help="Steps that are measured.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; the embedded default without."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the loop's figures to this file.")
@click.argument("overrides", nargs=-1)
def main(warmup: int, steps: int, config_file: Path | None, json_file: Path | None, overrides: tuple[str, ...]) -> None:
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
    rows = [row for row in map(json.loads, lines) if "throughput/step_s" in row][warmup:]
    figures = _figures(rows, tokens.steps[warmup:]) | {"peak_bytes": memory.peak_bytes, "restarts": summary["restarts"]}
    _show(config, rows, tokens.steps[warmup:], figures)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2))
    if summary["restarts"]:
        lost = ", ".join(f"{count} of {room}" for room, count in summary["restarts_by_room"].items())
        click.echo(f"workers were lost and replaced meanwhile ({lost}): measure again", err=True)


def _figures(rows: list[dict[str, Any]], tokens: list[Counter[str]]) -> dict[str, Any]:
    """The loop in the mean of the measured steps."""
    wall, total = sum(row["throughput/step_s"] for row in rows), sum(tokens, Counter())
    return {
        "steps": len(rows),
        "step_s": wall / len(rows),
        "tokens_per_s": total["generate"] / wall,
        "tokens_of_all_sources_per_s": total["learn"] / wall,
        "mean_length": total["generate"] / sum(row["mixture/student_rollouts"] for row in rows),
        "loss": sum(row["learner/loss"] for row in rows) / len(rows),
    }


def _show(config: Config, rows: list[dict[str, Any]], tokens: list[Counter[str]], figures: dict[str, Any]) -> None:
    table = Table("room", "tokens/s of its own work", "idle share", title="rooms", title_justify="left")
    for room in measured(rows, tokens, config):
        rate = f"{room.tokens_per_s:,.0f}" if room.tokens else "-"
        table.add_row(room.room, rate, f"{room.idle_share(figures['step_s']):.2f}")
    console = Console()
    console.print(table)
    sync = median(row["learner/weight_sync_s"] for row in rows)
    rollouts = {source: sum(row.get(f"mixture/{source}_rollouts", 0) for row in rows) for source in SOURCES}
    composition = " + ".join(f"{count / len(rows):.0f} {source}" for source, count in rollouts.items() if count)
    console.print(
        f"loop: {figures['tokens_per_s']:,.0f} student tokens trained per second "
        f"({figures['tokens_of_all_sources_per_s']:,.0f} of all sources), {figures['step_s'] * 1000:.0f} ms a step "
        f"of {composition} rollouts, over {len(rows)} steps"
    )
    console.print(
        f"weight sync: {sync * 1000:.0f} ms (median); peak memory {figures['peak_bytes'] / 2**30:.1f} GiB (PSS)"
    )


if __name__ == "__main__":
    main()
