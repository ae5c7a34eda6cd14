"""What failures and checkpoints cost, measured side by side in the same rooms.

    python jobs/bench_recovery.py [--steps N] [section.field=value ...]

Two runs of the configured system tell the cost of checkpoints: one without, one that takes a snapshot with every step
and writes every fifth. A third run loses a worker of every room, one after the other, to SIGKILL: the longest time
between two finished steps after it, and how many steps had to be done again.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import psutil
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.embedded.resolve import resolve
from opd_ray.placement.session import Session, cluster
from opd_ray.run import preflight
from opd_ray.run.train import train
from opd_ray.watch.observers import StepReport

_QUIET = (
    "guard.level=off",
    "evaluation.num_problems=0",
    "evaluation.every_steps=0",
    "metrics.rollout_log_every_steps=0",
)
_WARMUP = 10
_VICTIMS = {"student generator": "StudentGenerator", "teacher scorer": "Scorer", "learner rank": "Learner"}


@dataclass
class Killer:
    """An observer that kills a worker every so many steps and measures the pause that follows."""

    every_steps: int
    pauses: dict[str, float] = field(default_factory=dict)
    """Victim to the longest time between two steps after its death."""
    repeated: dict[str, int] = field(default_factory=dict)
    _victims: list[str] = field(default_factory=lambda: list(_VICTIMS))
    _last: str | None = None
    _step: int = 0
    _at: float = field(default_factory=time.monotonic)

    async def on_step(self, report: StepReport) -> None:
        """Notes the time since the step before, and kills the next one when it is time."""
        now = time.monotonic()
        if self._last is not None:
            self.pauses[self._last] = max(self.pauses.get(self._last, 0.0), now - self._at)
            if report.step <= self._step:
                self.repeated[self._last] = self.repeated.get(self._last, 0) + 1
        if report.step % self.every_steps == self.every_steps - 1 and report.step > self._step and self._victims:
            self._last = self._victims.pop(0)
            os.kill(_process(_VICTIMS[self._last]).pid, signal.SIGKILL)
        self._step, self._at = max(self._step, report.step), now


def _process(title: str) -> psutil.Process:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{title}"):
                found.append(process)
        except psutil.Error:
            continue
    return min(found, key=psutil.Process.create_time)


def _step_times(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["throughput/step_s"] for row in rows if "throughput/step_s" in row][_WARMUP:]


@click.command()
@click.option("--steps", default=60, show_default=True, help="Steps of each run.")
@click.argument("overrides", nargs=-1)
def main(steps: int, overrides: tuple[str, ...]) -> None:
    """Measures the cost of checkpoints and of deaths."""
    kinds = {
        "without": ("checkpoint.every_steps=0", "checkpoint.memory_every_steps=0"),
        "with": ("checkpoint.every_steps=5", "checkpoint.memory_every_steps=1"),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    killer = Killer(every_steps=steps // 4)
    base = [f"learner.steps={steps}", *_QUIET, *overrides]
    with tempfile.TemporaryDirectory() as directory, cluster():
        config = configs.load(None, base)
        preflight.check_files(resolve(config))
        session = Session()
        try:
            for attempt in range(2):  # in turn, so that what else the machine does falls on both
                for kind, fields in kinds.items():
                    run_dir = Path(directory) / f"{kind}-{attempt}"
                    train(configs.load(None, [*base, *fields]), run_dir, session=session)
                    times[kind] += _step_times(run_dir)
            train(configs.load(None, base), Path(directory) / "kills", session=session, observers=(killer,))
        finally:
            session.close()
    _show(times, killer)


def _show(times: dict[str, list[float]], killer: Killer) -> None:
    console = Console()
    mean = {kind: sum(each) / len(each) for kind, each in times.items()}
    console.print(
        f"step without checkpoints {mean['without'] * 1000:.0f} ms, with a snapshot every step and a checkpoint every "
        f"fifth {mean['with'] * 1000:.0f} ms: ratio {mean['with'] / mean['without']:.2f} "
        f"(medians {median(times['without']) * 1000:.0f} and {median(times['with']) * 1000:.0f} ms)"
    )
    table = Table("killed", "longest pause between two steps, s", "steps done again")
    for name in _VICTIMS:
        if name in killer.pauses:
            table.add_row(name, f"{killer.pauses[name]:.1f}", str(killer.repeated.get(name, 0)))
    console.print(table)


if __name__ == "__main__":
    main()
