"""What ``opd-ray status`` prints."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opd_ray.status.reasons import driver_alive, explain, silence
from opd_ray.status.state import FILE, RoomStatus, Status, read

_WIDTH = 160
"""Columns where the output is no terminal."""


def show(run_dir: Path, *, as_json: bool = False, in_place: bool = False) -> bool:
    """Prints where a run stands; is there more to come? Raises InputError if ``run_dir`` holds no run's status."""
    status, silent, gone = _look(run_dir)
    if as_json:
        print(json.dumps(_plain(status, silent), ensure_ascii=False), flush=True)
    else:
        console = Console()
        if in_place:
            console.clear()  # does nothing where the output is no terminal
        Console(width=None if console.is_terminal else _WIDTH).print(_page(status, silent))
    return not (status.ended or gone)


def watch(run_dir: Path, every_s: float, *, as_json: bool = False) -> None:
    """Prints again and again until the run has ended or its driver is gone; on a terminal in place, as JSON one line
    each time."""
    while show(run_dir, as_json=as_json, in_place=True):
        time.sleep(every_s)


def _look(run_dir: Path) -> tuple[Status, str | None, bool]:
    """The status, what its silence means, and whether the driver is known to be gone."""
    status = read(run_dir / FILE)
    alive = driver_alive(status)
    return status, silence(status, run_dir, time.time(), alive), alive is False


def _plain(status: Status, silent: str | None) -> dict[str, Any]:
    return {"explanation": explain(status), "silence": silent, **dataclasses.asdict(status)}


def _page(status: Status, silent: str | None) -> RenderableType:
    head = [Text(explain(status), "bold")]
    if silent:
        head = [Text(silent, "bold red"), Text(f"before that: {explain(status)}")]
    return Group(*head, _facts(status), _rooms(status))


def _facts(status: Status) -> Table:
    table = Table(show_header=False)
    for name, value in _rows(status):
        table.add_row(name, Text(value))
    return table


def _rows(status: Status) -> Iterator[tuple[str, str]]:
    ago = "" if status.last_step_s_ago is None else f", the last {status.last_step_s_ago:.0f} s ago"
    yield "steps", f"{status.step} of {status.steps}{ago}"
    yield "phase", f"{status.phase} since {status.phase_since_s:.0f} s"
    yield "weights", f"version {status.version}"
    missing = f", the step waits for {len(status.missing_slots)}" if status.missing_slots else ""
    yield "slots", f"{status.slots_taken} of {status.num_slots} taken, {status.buffered_slots} scored{missing}"
    yield "checkpoint", "none yet" if status.checkpoint_step is None else f"step {status.checkpoint_step}"
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.time))
    yield "driver", f"process {status.pid} on {status.host}, wrote this at {written}"


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
