"""The trace of a run: what the driver and every actor were at, one lane each, as Perfetto and Chrome open it.

Actors keep their spans (:mod:`opd_ray.rooms.spans`), by their own clocks; the driver collects them every two seconds.
It reads its clock before it asks and when it has the answer: in between an actor read its own, so the two are known to
within half of that time, and the quickest of the last answers of a node says it best. All lanes are on the driver's
clock then; each node's label has the error that is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from opd_ray.errors import ActorError
from opd_ray.messages import Span
from opd_ray.rooms import Rooms
from opd_ray.rooms.node import this_node
from opd_ray.rooms.room import Member, Room
from opd_ray.rooms.spans import SEAM_S, joined
from opd_ray.rooms.threads import in_thread
from opd_ray.watch.trace_file import DRIVER, TraceFile

_EVERY_S = 2.0
_ANSWER_S = 10.0
_LONGEST_S = 30.0
"""What lasts is written now and then, not at its end alone."""
_KINDS = {"waiting for rollouts": "wait", "training": "train", "broadcasting": "broadcast", "recording": "record"}
"""Phases that are called as what workers are at."""


class Trace:
    """Of one start of a run. A trace that fails costs a warning and itself, nothing else."""

    def __init__(self, run_dir: Path, rooms: Rooms, say: Callable[..., None], since: float) -> None:
        """``since``: when the run began, of ``time.monotonic``."""
        self._rooms, self._say, self._since = rooms, say, since
        self._file = TraceFile(run_dir, since)
        self._here = this_node()
        self._clocks: defaultdict[str, Clock] = defaultdict(Clock)
        self._last: dict[tuple[str, str, str], Span] = {}
        """Of each lane (node, name, room) the last span, which may go on."""
        self._ending = asyncio.Event()
        self._collecting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Collects from now on, until ``close`` or until the trace cannot be written."""
        self._collecting = asyncio.create_task(self._collect_on(), name="trace")

    async def _collect_on(self) -> None:
        try:
            while not self._ending.is_set():
                await self.collect()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), _EVERY_S)
        except Exception as error:  # whatever it is, no run ends for its trace
            reason = f"{type(error).__name__}: {error}"
            self._say("trace_failed", f"the trace ends here, and the run goes on: {reason}")

    async def collect(self) -> None:
        """Writes what the actors were at since they were asked last. Raises OSError."""
        asked = [(room, member) for room in self._rooms.every for member in room.those("ready", "joining", "leaving")]
        await asyncio.gather(*(self._ask(room, member) for room, member in asked))
        errors = {node: clock.error_s for node, clock in self._clocks.items() if node != self._here}
        await in_thread(self._file.flush, errors)

    def phase(self, phase: str, began: float, ended: float, step: int) -> None:
        """The driver leaves a phase; ``step``: finished steps."""
        span = Span(_KINDS.get(phase, phase), began, ended - began, {"step": step})
        self._file.span(self._here, DRIVER, "drive", span)

    def mark(self, kind: str, text: str) -> None:
        """Something happened."""
        self._file.mark(self._here, DRIVER, kind, text, time.monotonic())

    async def close(self) -> None:
        """What there is still to write, and the end of the file."""
        self._ending.set()
        with contextlib.suppress(Exception):  # of which has been told, or the last spans are missing
            async with asyncio.timeout(_ANSWER_S):
                await asyncio.wait([self._collecting])  # what a worker answers to one who has given up is lost
                await self.collect()
        for lane, span in self._last.items():
            self._file.span(*lane, span)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_S):
                await in_thread(self._file.close)

    async def _ask(self, room: Room, member: Member) -> None:
        asked = time.monotonic()
        try:
            answer = await room.peek(member, "timeline", _ANSWER_S)
        except ActorError:
            return  # the supervisor sees to those that are lost
        clock = self._clocks[member.node]
        clock.look(asked, time.monotonic(), answer.now_s)
        ahead = 0.0 if member.node == self._here else clock.ahead_s  # a machine has one such clock
        for span in answer.spans:
            span = span._replace(began_s=span.began_s + ahead)
            if span.began_s >= self._since:  # not of a run before in the same rooms
                self._take(room.room, member, span)

    def _take(self, room: str, member: Member, span: Span) -> None:
        lane = (member.node, member.name, room)
        before = self._last.get(lane)
        end = before.began_s + before.lasted_s if before else span.began_s
        if (early := end - span.began_s) > 0:  # by what is known of its clock now
            span = span._replace(began_s=end, lasted_s=max(0.0, span.lasted_s - early))
        whole = joined(before, span) if before and before.lasted_s < _LONGEST_S else None
        if before is not None and whole is None:
            self._file.span(*lane, before)
            if room == "learn" and span.began_s - end > SEAM_S:
                self._file.span(*lane, Span("wait", end, span.began_s - end, {}))
        self._last[lane] = whole or span


class Clock:
    """How far the driver's clock is ahead of a node's, by the quickest of the last answers."""

    def __init__(self, looks: int = 16) -> None:
        self._looks: deque[tuple[float, float]] = deque(maxlen=looks)

    def look(self, asked_s: float, answered_s: float, theirs_s: float) -> None:
        """``theirs_s``: their clock, at some time between the other two."""
        self._looks.append(((answered_s - asked_s) / 2, (asked_s + answered_s) / 2 - theirs_s))

    @property
    def error_s(self) -> float:
        """At most."""
        return min(self._looks)[0]

    @property
    def ahead_s(self) -> float:
        return min(self._looks)[1]
