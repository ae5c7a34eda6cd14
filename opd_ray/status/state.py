"""What is known of a run at one moment, and the file that holds it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from opd_ray.disk import whole
from opd_ray.errors import InputError

FILE = "status.json"
"""Name of the file in the run directory."""
WRITE_EVERY_S = 2.0
"""How often the driver writes it."""
FAR_EVERY_S = 20.0
"""How often it writes it to a storage elsewhere."""
STALE_S = 15.0
"""Age from which the file counts as old, as late as it may come."""
MOST_CALLS = 5
"""Calls of a room that are listed."""

Phase = Literal[
    "starting",
    "evaluating",
    "waiting for rollouts",
    "training",
    "broadcasting",
    "recording",
    "saving",
    "restoring",
    "exporting",
    "done",
    "stopped",
    "failed",
]
Place = Literal["generate", "score", "not admitted"]


@dataclass(frozen=True)
class CallStatus:
    """A call under way."""

    member: str
    node: str
    method: str
    since_s: float
    """Its age at its worker, seconds."""
    silent_s: float | None = None
    """For how long its worker has answered nothing, which is what the room's limit is about; None for its age."""


@dataclass(frozen=True)
class RoomStatus:
    """The workers of one room and what they are at."""

    room: str
    ready: int
    """Workers that take calls."""
    starting: int
    """Workers that were asked for and do not work yet."""
    minimum: int
    maximum: int
    waiting: int
    """Calls for which no worker is ready, or none has room."""
    calls: tuple[CallStatus, ...]
    """Calls at a worker, oldest first, at most MOST_CALLS of them: see oldest_calls."""
    num_calls: int
    """All calls: at a worker or waiting for one."""
    restarts: int
    last_loss: str | None
    """How the last worker was lost, one line."""
    below_min_s: float | None
    """For how long the room has had fewer workers than its minimum; None if it has enough."""
    busy_share: float
    """Share of the time that a worker had calls, mean over the workers."""
    spawning: tuple[CallStatus, ...] = ()
    """Workers that do not work yet, oldest first, with their state as the method: "starting", or "joining" when they
    are up but without the current weights."""
    calls_done: int = 0
    """Calls answered since the room began."""
    deadline_s: float | None = None
    """How long a worker with calls may answer none."""
    note: str | None = None
    """What is wrong with the servers that its workers ask; None where nothing is, or where they ask none."""


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    time: float
    """When this was written, seconds since the epoch."""
    pid: int
    host: str
    """The driver's process, and the host name of its machine."""
    phase: Phase
    phase_since_s: float
    step: int
    """Finished optimizer steps, which is also the 0-based number of the step under way."""
    steps: int
    version: int
    """Version of the weights that the generators hold."""
    last_step_s_ago: float | None
    slots_taken: int
    num_slots: int
    buffered_slots: int
    missing_slots: tuple[int, ...]
    """Slots that the learner waits for."""
    slots_at: dict[int, Place]
    """Where slots are, those that are missing at least."""
    checkpoint_step: int | None
    """Step of the newest complete checkpoint."""
    rooms: tuple[RoomStatus, ...]
    note: str | None = None
    """How the run ended; None while it goes on."""
    below_min_limit_s: float | None = None
    """How long a room may be below its minimum before the run ends."""

    @property
    def ended(self) -> bool:
        return self.phase in ("done", "stopped", "failed")


def oldest_calls(calls: Iterable[CallStatus]) -> tuple[CallStatus, ...]:
    """At most MOST_CALLS, oldest first; the oldest of every method is among them, so that long calls of one kind don't
    hide another one that hangs."""
    ordered = sorted(calls, key=lambda call: -call.since_s)
    seen: set[str] = set()
    firsts, others = [], []
    for call in ordered:
        (others if call.method in seen else firsts).append(call)
        seen.add(call.method)
    return tuple(sorted((firsts + others)[:MOST_CALLS], key=lambda call: -call.since_s))


_ADAPTER = TypeAdapter(Status)


class NoStatus(InputError):
    """There is none, or not yet."""


def write(path: Path, status: Status) -> None:
    """Writes the file, all or nothing: a reader sees the old one or the new one. Raises OSError."""
    with whole(path) as partial:
        partial.write_text(as_text(status))


def as_text(status: Status) -> str:
    return json.dumps(dataclasses.asdict(status)) + "\n"


def read(path: Path) -> Status:
    """The status that ``write`` wrote; raises NoStatus if there is none, InputError for something else."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise NoStatus(
            f"{path}: no such file; expected the run directory of a run that has begun (opd-ray train --run-dir DIR)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return parsed(text, path)


def parsed(text: str | bytes, path: Path | str) -> Status:
    """``as_text`` again; ``path``: where it stands. Raises InputError."""
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: not the status of a run of this version of opd_ray: {where + ': ' if where else ''}{first['msg']}"
        ) from None


@dataclass
class Whereabouts:
    """The driver's phase, and since when; one for a run."""

    phase: Phase = "starting"
    since: float = field(default_factory=lambda: time.monotonic())  # looked up then: tests have another clock
    step: int = 0
    """Finished optimizer steps."""
    version: int = 0
    """Of the weights that the generators hold."""
    last_step_at: float | None = None
    checkpoint_step: int | None = None
    note: str | None = None
    """How the run ended."""
    left: Callable[[Phase, float, float], None] = lambda *_: None
    """Is told of each phase that is over: which, from when to when."""

    def enter(self, phase: Phase) -> None:
        if phase != self.phase:
            now = time.monotonic()
            self.left(self.phase, self.since, now)
            self.phase, self.since = phase, now

    def end(self, phase: Phase, note: str) -> None:
        """``note``: how the run ended, one sentence."""
        self.enter(phase)
        self.note = note

    def how_to_go_on(self, run_dir: Path) -> str:
        saved = self.checkpoint_step
        there = "there is no checkpoint" if saved is None else f"the checkpoint of step {saved} is written"
        return f"{there}; go on with --run-dir {run_dir} --resume, resuming from step {saved or 0}"

    def finish_step(self, step: int) -> None:
        self.step, self.last_step_at = step, time.monotonic()
