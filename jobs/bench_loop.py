"""The rate of every room and of the whole loop, after warm-up, and the share of what its stages could do at best.

    python jobs/bench_loop.py [--warmup N] [--steps N] [--config FILE | --row N] [--staleness 0,1,2,4] [--ideal]
                              [--json FILE] [section.field=value ...]

Without --config it is the embedded default, with --row the material and the settings of a row of race_material.py.
--staleness: a run for each value of buffer.max_staleness, one after the other in the same rooms; 0 is synchronous, 1
one step off. Nothing is evaluated or saved, no guard looks, no rollouts are logged. A run has some more steps than
those of warm-up and those that are measured: at its end generators have ever less to do.

A room's rate is tokens per second of *its own work*: what it could do if nothing ever made it wait. The loop's rate
is tokens trained per second of wall clock. Memory is the proportional set size (PSS) of every
process of the run, Ray's own included, so shared pages count once.

--ideal measures the stages of the last run without the loop, after it, alone and side by side; bare_stages.py has how,
and the formula: the lesser of the cores by all core-seconds that stages need for a token, and of the slowest stage's
pace. Beside it stand the core-ms that the processes of a run took in the measured steps, that others on the machine did
(a hypervisor, too), and that nobody did: what a room takes beyond its bare stage, driver, Ray and idle cores make the
difference. What stages take side by side beyond what they take alone is the machine's, and no loop gets it back.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import bare_stages
import click
import psutil
import ray
from bare_stages import Bare, Ideal
from race_material import ROWS, overrides, prepare
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.config.help import OutputFile
from opd_ray.errors import OpdError
from opd_ray.messages import SOURCES, Entry
from opd_ray.placement.session import Session, cluster
from opd_ray.plan.rates import RoomRate, Tokens, measured
from opd_ray.rooms.logs import ROOM_VARIABLE
from opd_ray.run.provenance import provenance
from opd_ray.run.train import checked, train
from opd_ray.watch.observers import StepReport

_KEPT_STEPS = 3
"""The last ones, on whose rollouts the stages work alone."""
_FETCH_S = 60.0
_FIXED = [
    "guard.level=off",
    "evaluation.num_problems=0",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "metrics.rollout_log_every_steps=0",
]
console = Console(highlight=False, width=120)


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


class CoreSeconds:
    """Observer: what the processes of the run took from the end of one step to the end of another."""

    def __init__(self, after: int, until: int) -> None:
        self._after, self._until = after, until
        self._before: Counter[tuple[int, str]] = Counter()
        self._began = 0.0
        self.by_room: Counter[str] = Counter()
        """With those that nobody used as "idle", and those of others on this machine as "others"."""

    async def on_step(self, report: StepReport) -> None:
        if report.step == self._after:
            self._before, self._began = _core_seconds(), time.monotonic()
        elif report.step == self._until:
            for (pid, room), seconds in _core_seconds().items():
                self.by_room[room] += seconds - self._before[pid, room]
            whole = (time.monotonic() - self._began) * len(_cores())
            self.by_room["others"] = max(0.0, whole - self.by_room.total())


class Kept:
    """Observer: the rollouts of the last steps up to one."""

    def __init__(self, until: int) -> None:
        self._until = until
        self._steps: list[Sequence[Entry]] = []

    async def on_step(self, report: StepReport) -> None:
        if self._until - _KEPT_STEPS < report.step <= self._until:
            self._steps.append([replace(entry, scores=dict.fromkeys(entry.scores)) for entry in report.entries])

    def steps(self) -> list[list[Entry]]:
        """With payloads in place of their refs."""
        refs = list({entry.rollouts: None for step in self._steps for entry in step})
        payloads = dict(zip(refs, ray.get(refs, timeout=_FETCH_S), strict=True))
        return [[replace(entry, rollouts=payloads[entry.rollouts]) for entry in step] for step in self._steps]


def _core_seconds() -> Counter[tuple[int, str]]:
    """By process and what it is, since it began."""
    every, this = psutil.cpu_times(percpu=True), psutil.Process()
    idle = sum(every[core].idle + getattr(every[core], "iowait", 0.0) for core in _cores())
    found = Counter({(0, "idle"): idle})
    for process in _processes():
        try:
            room = "driver" if process == this else process.environ().get(ROOM_VARIABLE, "ray")
            times = process.cpu_times()
        except psutil.Error:  # it ended between the listing and the look
            continue
        found[process.pid, room] = times.user + times.system
    return found


def _cores() -> list[int]:
    """Those that this process and what it starts may use: of a larger machine `taskset` leaves some."""
    this = psutil.Process()
    return this.cpu_affinity() if hasattr(this, "cpu_affinity") else list(range(psutil.cpu_count()))


def _processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended between the listing and the look
        return 0


@click.command()
@click.option(
    "--warmup",
    type=click.IntRange(1),
    help="Steps that are not measured; 20, or the row's number, and max_staleness + 2 at least.",
)
@click.option("--steps", type=click.IntRange(1), help="Steps that are measured; 100, or the row's number.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; the embedded default without."
)
@click.option("--row", type=click.Choice([str(number) for number in ROWS]), help="Row of race_material.py.")
@click.option("--staleness", help="Values of buffer.max_staleness, one run each; the configured one without.")
@click.option("--ideal", "with_ideal", is_flag=True, help="Measure the stages without the loop, too.")
@click.option("--json", "json_file", type=OutputFile(), help="Write the figures to this file.")
@click.argument("given", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def main(
    warmup: int | None,
    steps: int | None,
    config_file: Path | None,
    row: str | None,
    staleness: str | None,
    with_ideal: bool,
    json_file: Path | None,
    given: tuple[str, ...],
) -> None:
    """Measures the rooms and the loop."""
    if row and config_file:
        raise click.UsageError(f"--row {row} brings its own configuration; leave out --config {config_file}")
    raced = ROWS[int(row or 1)]  # the embedded default is that of the first
    warmup, steps = warmup or raced.warmup, steps or raced.steps
    try:
        for mode in _modes(staleness):
            configs.load(None, mode)  # refused before models are made
        with tempfile.TemporaryDirectory() as directory:
            own = overrides(raced, prepare(raced, Path(directory))) if row else []
            modes = [configs.load(config_file, [*own, *given, *_FIXED, *mode]) for mode in _modes(staleness)]
            found = measure(modes, warmup, steps, Path(directory), with_ideal)
    except OpdError as error:
        print(f"bench_loop: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2))


def _modes(staleness: str | None) -> list[list[str]]:
    """What each run has beyond the others."""
    return (
        [[f"buffer.max_staleness={bound.strip()}"] for bound in staleness.split(",")] if staleness is not None else [[]]
    )


def measure(modes: Sequence[Config], warmup: int, steps: int, directory: Path, with_ideal: bool) -> dict[str, Any]:
    """One run after the other, in rooms that stay up, and then the stages of the last one alone."""
    if with_ideal:
        bare_stages.check(modes[0])
    session, found = Session(), []
    with cluster():
        try:
            for number, config in enumerate(modes):
                figures, kept = _run(config, warmup, steps, directory / f"run-{number}", session)
                found.append(figures)
            rollouts = kept.steps()
            where = provenance()
        finally:
            session.close()
    whole = where | {"modes": found}
    if with_ideal:
        bare, best = _ideal(modes[-1], rollouts, found[-1]["workers"])
        whole |= {"bare": {stage: asdict(each) for stage, each in bare.items()}, "ideal": asdict(best)}
        _show_ideal(found, bare, best)
    return whole


def _run(config: Config, warmup: int, steps: int, run_dir: Path, session: Session) -> tuple[dict[str, Any], Kept]:
    """The figures of one run and the rollouts of its last measured steps. Left out are the first steps, whose rollouts
    were admitted at once, and the last, when generators have ever less to do: they go faster than a run does."""
    around = config.buffer.max_staleness + 1
    warmup = max(warmup, around + 1)
    end = warmup + steps
    config = replace(config, learner=replace(config.learner, steps=end + around))
    tokens, cores, kept = Tokens(), CoreSeconds(warmup, end), Kept(end)
    with PeakMemory() as memory:
        summary = train(config, run_dir, observers=(tokens, cores, kept), session=session)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "throughput/step_s" in row][warmup:end]
    counts = tokens.steps[warmup:end]
    figures = _figures(rows, counts) | {"peak_bytes": memory.peak_bytes, "restarts": summary["restarts"]}
    rooms = measured(rows, counts, config)
    trained = figures["tokens_per_s"] * figures["step_s"] * len(rows)
    figures |= {
        "max_staleness": config.buffer.max_staleness,
        "staleness": sum(row["staleness/mean"] for row in rows) / len(rows),
        "workers": {room.room: room.workers for room in rooms},
        "core_s_per_token": {room: seconds / trained for room, seconds in cores.by_room.items()},
    }
    _show(config, rows, rooms, figures)
    if summary["restarts"]:
        lost = ", ".join(f"{count} of {room}" for room, count in summary["restarts_by_room"].items())
        click.echo(f"workers were lost and replaced meanwhile ({lost}): measure again", err=True)
    return figures, kept


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


def _show(config: Config, rows: list[dict[str, Any]], rooms: Sequence[RoomRate], figures: dict[str, Any]) -> None:
    table = Table("room", "tokens/s of its own work", "idle share", title="rooms", title_justify="left")
    for room in rooms:
        rate = f"{room.tokens_per_s:,.0f}" if room.tokens else "-"
        table.add_row(room.room, rate, f"{room.idle_share(figures['step_s']):.2f}")
    console.print(table)
    sync = median(row["learner/weight_sync_s"] for row in rows)
    rollouts = {source: sum(row.get(f"mixture/{source}_rollouts", 0) for row in rows) for source in SOURCES}
    composition = " + ".join(f"{count / len(rows):.0f} {source}" for source, count in rollouts.items() if count)
    console.print(
        f"max_staleness {config.buffer.max_staleness}: {figures['tokens_per_s']:,.0f} student tokens trained per "
        f"second ({figures['tokens_of_all_sources_per_s']:,.0f} of all sources), {figures['step_s'] * 1000:.0f} ms a "
        f"step of {composition} rollouts, over {len(rows)} steps"
    )
    console.print(
        f"weight sync: {sync * 1000:.0f} ms (median); peak memory {figures['peak_bytes'] / 2**30:.1f} GiB (PSS)"
    )


def _ideal(
    config: Config, rollouts: Sequence[bare_stages.Step], workers: dict[str, int]
) -> tuple[dict[str, Bare], Ideal]:
    _, config, facts = checked(config)
    bare = bare_stages.measure(config, facts.max_context_tokens, facts.eos_token_ids, rollouts)
    return bare, bare_stages.ideal(bare, workers, len(_cores()))


def _show_ideal(modes: Sequence[dict[str, Any]], bare: dict[str, Bare], best: Ideal) -> None:
    names = [f"max_staleness {mode['max_staleness']}" for mode in modes]
    table = Table("", "alone", "side by side", *names, title="core-ms for 1,000 student tokens", title_justify="left")
    spent = [mode["core_s_per_token"] for mode in modes]
    for room in dict.fromkeys([*bare, *(room for each in spent for room in each)]):
        without = (bare[room].core_s, bare[room].beside_core_s) if room in bare else (math.nan, math.nan)
        takes = [*without, *(each.get(room, 0.0) for each in spent)]
        table.add_row(room, *("-" if math.isnan(core_s) else f"{core_s * 1e6:,.0f}" for core_s in takes))
    console.print(table)
    console.print(
        f"ideal: {best.tokens_per_s:,.0f} student tokens a second of {len(_cores())} cores by what stages take alone, "
        f"{best.beside_tokens_per_s:,.0f} side by side; slowest stage: {best.slowest}, "
        f"{best.slowest_tokens_per_s:,.0f}"
    )
    heads = "of the ideal alone", "side by side", "of the slowest stage"
    table = Table("max_staleness", "in the mean", "tokens/s", *heads)
    for mode in modes:
        rate = mode["tokens_per_s"]
        shares = (rate / best for best in (best.tokens_per_s, best.beside_tokens_per_s, best.slowest_tokens_per_s))
        table.add_row(
            str(mode["max_staleness"]), f"{mode['staleness']:.2f}", f"{rate:,.0f}", *(f"{each:.2f}" for each in shares)
        )
    console.print(table)


if __name__ == "__main__":
    main()
