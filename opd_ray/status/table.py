"""What ``opd-ray status`` prints."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from opd_ray.status.reasons import driver_alive, explain, silence
from opd_ray.status.sources import runs_in, status_of
from opd_ray.status.state import NoStatus, RoomStatus, Status

_WIDTH = 160
"""Columns where the output is no terminal."""


def show(where: str, *, as_json: bool = False, in_place: bool = False) -> bool:
    """Prints where a run stands; is there more to come? ``where`` as of status_of, whose errors it raises."""
    status = status_of(where)
    alive = driver_alive(status)
    silent = silence(status, where, time.time(), alive)
    if as_json:
        _print_json({"explanation": explain(status), "silence": silent, **dataclasses.asdict(status)})
    else:
        console = Console()
        if in_place:
            console.clear()  # does nothing where the output is no terminal
        head = [Text(explain(status), "bold")]
        if silent:
            head = [Text(silent, "bold red"), Text(f"before that: {explain(status)}")]
        page = Group(*head, _facts(status), _rooms(status))
        _console().print(page)
    return not (status.ended or alive is False)


def watch(where: str, every_s: float, *, as_json: bool = False) -> None:
    """Prints again and again until the run has ended or its driver is gone; on a terminal in place, as JSON one line
    each time. A run that is not there yet is waited for."""
    waits, more = False, True
    while more:
        try:
            more = show(where, as_json=as_json, in_place=True)
        except NoStatus as error:
            if not waits:
                print(f"waiting until it is there (Ctrl-C ends it): {error}", file=sys.stderr, flush=True)
            waits = True
        if more:
            time.sleep(every_s)


def list_runs(directory: Path, *, as_json: bool = False) -> None:
    """Prints a line on each run in a directory, the newest first. Raises InputError where there is none."""
    found = [(path, *_at_a_glance(path, status)) for path, status in runs_in(directory)]
    if as_json:
        names = ("run", "phase", "step", "steps", "written", "explanation")
        _print_json([dict(zip(names, (str(path), *rest), strict=True)) for path, *rest in found])
        return
    table = Table("run", "steps", "written", "")
    for path, _, step, steps, written, text in found:
        when = "" if written is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
        table.add_row(Text(str(path)), "" if step is None else f"{step} of {steps}", when, Text(text))
    _console().print(table)


def _at_a_glance(path: Path, status: Status | None) -> tuple[Any, ...]:
    """Phase, step, steps, when that was written, and a sentence."""
    if status is None:
        return None, None, None, None, "status.json is of another version of opd_ray"
    text = silence(status, path, time.time(), driver_alive(status)) or explain(status)
    return status.phase, status.step, status.steps, status.time, text


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else _WIDTH)


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
