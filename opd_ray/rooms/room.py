"""One room's actors: their states, the calls to them, and what each failure means.

Every call has a deadline, and every failure names room, actor, method and node. The room's own deadline is one of
progress: it counts from the actor's last answer, since a call that waits at its actor for others says nothing about
the actor's health. Rooms also measure how long their actors had work, which is each room's idle share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Awaitable, Callable
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

State = Literal["starting", "joining", "ready", "leaving", "gone"]
"""On its way up; up but without the current weights; at work; finishing its last calls; lost or ended."""


@dataclass(eq=False)
class Member:
    """One actor of a room, and its work so far."""

    handle: ActorHandle
    name: str
    node: str = "not placed yet"
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    """When it came into its state."""
    ready_since: float | None = None
    calls: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Calls under way: method, and when it was made."""
    answered_at: float = 0.0
    """When a call of it ended last, other than by its loss."""
    _busy_s: float = 0.0
    _busy_since: float = 0.0
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    def become(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()
        if state == "ready" and self.ready_since is None:
            self.ready_since = self.since

    def begin(self, method: str) -> int:
        """A call begins; its number, for ``end``."""
        if not self.calls:
            self._busy_since = time.monotonic()
        number = next(self._numbers)
        self.calls[number] = (method, time.monotonic())
        return number

    def end(self, number: int, answered: bool = True) -> None:
        del self.calls[number]
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

    pings: str | None = None
    """Concurrency group of the actors that answers while they are at work; None where all calls do (async actors)."""

    def __init__(self, room: str, deadline_s: float) -> None:
        """``deadline_s``: how long an actor with calls may answer none, where a call has no limit of its own."""
        self.room, self.deadline_s = room, deadline_s
        self.members: list[Member] = []
        self.last_loss: str | None = None
        self.calls_done = 0
        self._gone_busy_s = self._gone_ready_s = 0.0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_calls(self) -> int:
        """Calls under way and waiting."""
        return sum(member.num_calls for member in self.members)

    def work(self) -> tuple[float, float]:
        """Seconds of work and seconds of being there, summed over all workers that ever were ready."""
        busy = self._gone_busy_s + sum(member.busy_s() for member in self.members)
        return busy, self._gone_ready_s + sum(member.ready_s() for member in self.members)

    async def ask(
        self, member: Member, method: str, *args: Any, deadline_s: float | None = None, **options: Any
    ) -> Any:
        """One answer of one member; ``options`` are Ray's for the call. A ``deadline_s`` counts from now."""
        bound = getattr(member.handle, method)
        ref = (bound.options(**options) if options else bound).remote(*args)
        return await self._answer(member, method, ref, deadline_s)

    async def ask_for_payload(
        self, member: Member, method: str, *args: Any, deadline_s: float | None = None
    ) -> tuple[Any, ObjectRef]:
        """The first return value, and a ref to the second, which stays in the object store."""
        answer, payload = getattr(member.handle, method).options(num_returns=2).remote(*args)
        return await self._answer(member, method, answer, deadline_s), payload

    async def ping(self, member: Member, deadline_s: float) -> None:
        """Waits for a sign of life, which an actor gives while it is at work as well. Raises MemberLost."""
        method = member.handle.node
        ref = (method.options(concurrency_group=self.pings) if self.pings else method).remote()
        where = f"{self.room}: {member.name} on {member.node}, heartbeat"
        await self._value_of(where, asyncio.wait_for(_value(ref), deadline_s), deadline_s)

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

    async def _answer(self, member: Member, method: str, ref: ObjectRef, deadline_s: float | None) -> Any:
        call = member.begin(method)
        where, answered = f"{self.room}: {member.name} on {member.node}, {method}()", True
        try:
            if deadline_s is None:
                return await self._value_of(where, self._while_it_answers(member, ref), self.deadline_s)
            return await self._value_of(where, asyncio.wait_for(_value(ref), deadline_s), deadline_s)
        except MemberLost:
            answered = False  # to give up on one call must not give the calls beside it more time
            raise
        finally:
            member.end(call, answered)
            self.calls_done += 1

    async def _while_it_answers(self, member: Member, ref: ObjectRef) -> Any:
        """The value; raises TimeoutError when the member answers neither this call nor another one for the room's
        deadline."""
        since, value = time.monotonic(), asyncio.ensure_future(_value(ref))
        try:
            while not value.done():
                left = self.deadline_s - member.silent_s(since)
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([value], timeout=left)
            return value.result()
        finally:
            value.cancel()

    async def _value_of(self, where: str, value: Awaitable[Any], deadline_s: float) -> Any:
        try:
            return await value
        except TimeoutError:
            raise MemberLost(
                f"{where} gave no answer within {deadline_s:g} s; see its log in the Ray dashboard "
                "(or raise the room's deadline under deadlines.*)"
            ) from None
        except RayError as error:
            raise explained(where, error) from error


async def _value(ref: ObjectRef) -> Any:
    return await ref


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
    if isinstance(error, RayTaskError):
        return ActorError(f"{where} failed: {type(cause).__name__}: {cause}")
    return ActorError(f"{where}: {type(error).__name__}: {error}")


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
