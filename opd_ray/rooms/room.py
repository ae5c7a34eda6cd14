"""One room's actors: their states, the calls to them, and what each failure means.

Every call has a deadline, and every failure names room, actor, method and node. The room's own deadline is one of
progress: it counts from the actor's last answer, since a call that waits at its actor for others says nothing about
the actor's health. Rooms also measure how long their actors had work, which is each room's idle share.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from opd_ray.errors import (
    ActorError,
    EngineFailed,
    MemberLost,
    OpdError,
    PayloadLost,
    StartFailed,
    Unwritable,
    WeightSyncError,
)
from opd_ray.messages import PoolSize

State = Literal["starting", "joining", "ready", "leaving", "gone"]
"""On its way up; up but without the current weights; at work; finishing its last calls; lost or ended."""


UNPLACED = "not placed yet"
"""What stands for the node of an actor that has not told it."""


@dataclass(eq=False)
class Member:
    """One actor of a room, and its work so far."""

    handle: ActorHandle
    name: str
    node: str = UNPLACED
    """Host name and address of its node, as it told when it was up."""
    placed_on: str | None = None
    """The same of one that is starting, as far as Ray has been asked."""
    state: State = "starting"
    since: float = field(default_factory=lambda: time.monotonic())  # looked up at each call: tests have another clock
    """When it came into its state."""
    ready_since: float | None = None
    calls: list[tuple[str, float]] = field(default_factory=list)
    """Calls under way: method, and when it was made."""
    ends_at: float | None = None
    """When its node goes, where that is announced."""
    answered_at: float = 0.0
    """When a call of it ended last, other than by its loss."""
    _busy_s: float = 0.0
    _busy_since: float = 0.0

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @property
    def whereabouts(self) -> str:
        """Its node, and of one that has not answered yet, whether it has one."""
        return f"placed on {self.placed_on}, loading" if self.node == UNPLACED and self.placed_on else self.node

    def become(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()
        if state == "ready" and self.ready_since is None:
            self.ready_since = self.since

    def begin(self, method: str) -> tuple[str, float]:
        """A call begins, which is what ``end`` takes."""
        call = (method, time.monotonic())
        if not self.calls:
            self._busy_since = call[1]
        self.calls.append(call)
        return call

    def end(self, call: tuple[str, float], answered: bool) -> None:
        self.calls.remove(call)
        now = time.monotonic()
        if answered:
            self.answered_at = now
        if not self.calls:
            self._busy_s += now - self._busy_since

    def silent_s(self, since: float) -> float:
        """For how long it has answered nothing, as a call that was made at ``since`` sees it."""
        return time.monotonic() - max(since, self.answered_at)

    def busy_s(self) -> float:
        """Seconds with at least one call under way."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.calls else 0.0)

    def ready_s(self) -> float:
        """Seconds since it was ready for the first time."""
        return time.monotonic() - self.ready_since if self.ready_since is not None else 0.0


_FIELDS = re.compile(r"\b(class_name|actor_id|name|namespace|ip): \S+ ?")
Spawn = Callable[[int, int], Member]
"""Starts actor ``number`` of a room for the ``n``-th time; returns at once."""


class Room:
    """What pools and groups have in common."""

    holds_state: bool
    """Do its actors hold a state together, so that the loss of one is the loss of all?"""
    num_waiting = 0
    """Calls for which no actor is ready, or none has room."""

    def __init__(self, room: str, spawn: Spawn, size: PoolSize, deadline_s: float, pings: str | None = None) -> None:
        """``deadline_s``: how long an actor with calls may answer none, where a call has no limit of its own.
        ``pings``: concurrency group of the actors that answers while they are at work; None where all calls do (async
        actors)."""
        self.room, self.size, self.deadline_s = room, size, deadline_s
        self.members: list[Member] = []
        self.last_loss: str | None = None
        self.calls_done = 0
        self._spawn, self._pings = spawn, pings
        self._gone_busy_s = self._gone_ready_s = 0.0

    def __len__(self) -> int:
        return len(self.members)

    def those(self, *states: State) -> list[Member]:
        return [member for member in self.members if member.state in states]

    @property
    def num_calls(self) -> int:
        """Calls under way and waiting."""
        return sum(len(member.calls) for member in self.members) + self.num_waiting

    def work(self) -> tuple[float, float]:
        """Seconds of work and seconds of being there, summed over all workers that ever were ready."""
        busy = self._gone_busy_s + sum(member.busy_s() for member in self.members)
        return busy, self._gone_ready_s + sum(member.ready_s() for member in self.members)

    async def ask(
        self, member: Member, method: str, *args: Any, deadline_s: float | None = None, payload: bool = False
    ) -> Any:
        """The answer of one member; with ``payload``, (answer, ref to the method's second return value, which stays in
        the object store). A ``deadline_s`` counts from now. Raises what :func:`explained` makes of a failure, and
        MemberLost where there is no answer in time."""
        bound, call = getattr(member.handle, method), member.begin(method)
        answered = True
        try:
            if not payload:
                return await self._value(bound.remote(*args), member, f"{method}()", deadline_s)
            answer, ref = bound.options(num_returns=2).remote(*args)
            return await self._value(answer, member, f"{method}()", deadline_s), ref
        except MemberLost:
            answered = False  # to give up on one call must not give the calls beside it more time
            raise
        finally:
            member.end(call, answered)
            self.calls_done += 1

    async def ping(self, member: Member, deadline_s: float) -> None:
        """Waits for a sign of life, which an actor gives while it is at work as well. Raises MemberLost."""
        await self.peek(member, "node", deadline_s)

    async def peek(self, member: Member, method: str, deadline_s: float) -> Any:
        """The answer to a question beside the room's calls: it is none of them, and no sign that they get on. Raises
        MemberLost."""
        bound = getattr(member.handle, method)
        ref = (bound.options(concurrency_group=self._pings) if self._pings else bound).remote()
        what = "heartbeat" if method == "node" else f"{method}()"
        return await self._value(ref, member, what, deadline_s)

    async def _value(self, ref: ObjectRef, member: Member, what: str, deadline_s: float | None) -> Any:
        where = f"{self.room}: {member.name} on {member.node}, {what}"
        since, limit = time.monotonic(), self.deadline_s if deadline_s is None else deadline_s
        value = asyncio.ensure_future(ref)
        try:
            while not value.done():
                waited = member.silent_s(since) if deadline_s is None else time.monotonic() - since
                if waited >= limit:
                    raise MemberLost(
                        f"{where} gave no answer within {limit:g} s; see its log in the Ray dashboard "
                        "(or raise the room's deadline under deadlines.*)"
                    )
                await asyncio.wait([value], timeout=limit - waited)
            return value.result()
        except RayError as error:
            raise explained(where, error) from error
        finally:
            value.cancel()

    def end(self, member: Member) -> None:
        """Ends an actor and forgets it."""
        if member.state == "gone":
            return
        member.become("gone")
        self._gone_busy_s += member.busy_s()
        self._gone_ready_s += member.ready_s()
        self.members.remove(member)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(member.handle)

    def stop(self) -> None:
        """Ends every actor."""
        for member in list(self.members):
            self.end(member)


def busy_share(work: tuple[float, float], before: tuple[float, float]) -> float | None:
    """Share of the time that a room's actors had work between two looks at ``Room.work()``; None without actors."""
    busy, there = (now - then for now, then in zip(work, before, strict=True))
    return min(1.0, busy / there) if there > 0 else None


def explained(where: str, error: RayError) -> OpdError:
    """The error of this package that one of Ray's amounts to."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ObjectLostError):
        return PayloadLost(f"{where}: an object that it needs is gone with the node that held it")
    if isinstance(cause, WeightSyncError):
        return WeightSyncError(f"{where}: {cause}")
    if isinstance(cause, Unwritable):
        return Unwritable(str(cause.args[0]))
    if isinstance(cause, RuntimeEnvSetupError):
        return StartFailed(f"{where}: the actor could not start: {_line(cause)}")
    if isinstance(error, RayActorError):
        return (StartFailed if error.actor_init_failed else MemberLost)(f"{where}: {_death(error)}")
    if isinstance(cause, EngineFailed | RayActorError | OutOfMemoryError):
        return MemberLost(f"{where} failed: {type(cause).__name__}: {_line(cause)}")
    return ActorError(f"{where} failed: {type(cause).__name__}: {cause}")


def _death(error: RayActorError) -> str:
    """Why an actor died, in one line: of an error in its constructor the last line of the remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if getattr(error, "actor_init_failed", False):
        return f"the actor could not start: {lines[-1]}"
    # Ray adds the actor's fields, and for every death the same list of what may have been the cause.
    reason = _FIELDS.sub("", " ".join(lines)).partition(" Some common causes")[0]
    return f"the actor died: {reason.removeprefix('The actor died unexpectedly before finishing this task. ')}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
