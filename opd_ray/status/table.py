"""What ``opd-ray status`` prints."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from opd_ray.status.reasons import driver_alive, explain, silence
from opd_ray.status.state import FILE, RoomStatus, Status, read

_WIDTH = 160
"""Columns where the output is no terminal."""


def show(run_dir: Path, *, as_json: bool = False, in_place: bool = False) -> bool:
    """Prints where a run stands; is there more to come? Raises InputError if ``run_dir`` holds no run's status."""
    status = read(run_dir / FILE)
    alive = driver_alive(status)
    silent = silence(status, run_dir, time.time(), alive)
    if as_json:
        values = {"explanation": explain(status), "silence": silent, **dataclasses.asdict(status)}
        print(json.dumps(values, ensure_ascii=False), flush=True)
    else:
        console = Console()
        if in_place:
            console.clear()  # does nothing where the output is no terminal
        head = [Text(explain(status), "bold")]
        if silent:
            head = [Text(silent, "bold red"), Text(f"before that: {explain(status)}")]
        page = Group(*head, _facts(status), _rooms(status))
        Console(width=None if console.is_terminal else _WIDTH).print(page)
    return not (status.ended or alive is False)


def watch(run_dir: Path, every_s: float, *, as_json: bool = False) -> None:
    """Prints again and again until the run has ended or its driver is gone; on a terminal in place, as JSON one line
    each time."""
    while show(run_dir, as_json=as_json, in_place=True):
        time.sleep(every_s)


def _facts(status: Status) -> Table:
    ago = "" if status.last_step_s_ago is None else f", the last {status.last_step_s_ago:.0f} s ago"
    missing = f", the step waits for {len(status.missing_slots)}" if status.missing_slots else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.time))
    table = Table(show_header=False)
    for name, value in {
        "steps": f"{status.step} of {status.steps}{ago}",
        "phase": f"{status.phase} since {status.phase_since_s:.0f} s",
        "weights": f"version {status.version}",
        "slots": f"{status.slots_taken} of {status.num_slots} taken, {status.buffered_slots} scored{missing}",
        "checkpoint": "none yet" if status.checkpoint_step is None else f"step {status.checkpoint_step}",
        "driver": f"process {status.pid} on {status.host}, wrote this at {written}",
    }.items():
        table.add_row(name, Text(value))
    return table


def _rooms(status: Status) -> Table:
    table = Table("room", "ready", "starting", "size", "calls", "busy", "restarts", "oldest call", "last loss")
    for room in status.rooms:
        table.add_row(*(Text(cell) for cell in _cells(room)))
    return table


def _cells(room: RoomStatus) -> Iterator[str]:
    yield room.room
    yield str(room.ready)
    yield str(room.starting)
    yield str(room.minimum) if room.minimum == room.maximum else f"{room.minimum}–{room.maximum}"
    yield f"{room.num_calls}, {room.waiting} waiting" if room.waiting else str(room.num_calls)
    yield f"{room.busy_share:.0%}"
    yield str(room.restarts)
    oldest = room.calls[0] if room.calls else None
    yield f"{oldest.member} on {oldest.node}, {oldest.method}() {oldest.since_s:.0f} s" if oldest else ""
    yield room.last_loss or ""
