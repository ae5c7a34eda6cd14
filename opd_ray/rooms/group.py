"""Groups: workers that hold one state together, so that the loss of one is the loss of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from ray import ObjectRef
from ray.exceptions import RayTaskError

from opd_ray.errors import GroupLost, MemberLost, OpdError, PayloadLost, StartFailed, WeightSyncError
from opd_ray.messages import PoolSize
from opd_ray.rooms.room import Member, Room, Spawn

_GRACE_S = 5.0
"""How long a group whose collective broke is watched for the rank that died."""


class Group(Room):
    """Workers that make up one whole, as many as ``size``: none can be replaced alone."""

    holds_state = True

    def __init__(self, room: str, spawn: Spawn, size: int, deadline_s: float, pings: str | None = None) -> None:
        super().__init__(room, spawn, PoolSize.fixed(size), deadline_s, pings)
        self.is_up = False
        """Have its actors started, and do they know each other?"""
        self.num_restarts = 0
        self.on_stop: Callable[[], None] | None = None
        self.members = self._started()

    def restart(self) -> None:
        """Ends what is left of the group and starts all its actors anew."""
        super().stop()
        self.is_up = False
        self.num_restarts += 1
        self.members = self._started()

    def _started(self) -> list[Member]:
        return [self._spawn(number, self.num_restarts) for number in range(self.size.start)]

    def stop(self) -> None:
        super().stop()
        if self.on_stop is not None:
            self.on_stop()
            self.on_stop = None

    async def begin(self, *args: Any, deadline_s: float) -> None:
        """Another run."""
        await self.call_all("begin", *args, deadline_s=deadline_s)

    async def up(self, deadline_s: float) -> None:
        """Waits until every actor has started, and learns its node."""
        for member, node in zip(self.members, await self.call_all("node", deadline_s=deadline_s), strict=True):
            member.node = node
            member.become("ready")

    def lose(self, member: Member, cause: str) -> NoReturn:
        """A member is dead, or of no use, and its state with it: raises GroupLost."""
        raise self._lost(cause)

    async def call(self, method: str, *args: Any) -> tuple[Any, ObjectRef]:
        """(answer, ref to the payload) of the least loaded member."""
        member = min(self.members, key=lambda each: each.num_calls)
        try:
            return await self.ask(member, method, *args, payload=True)
        except MemberLost as error:
            self.lose(member, str(error))

    async def call_all(self, method: str, *args: Any, each: Iterable[Any] | None = None, **options: Any) -> list[Any]:
        """Calls every member at once, with the ``options`` of ``ask``; ``each`` gives every member a first argument of
        its own."""
        own = [()] * len(self) if each is None else [(value,) for value in each]
        tasks = [
            asyncio.ensure_future(self.ask(member, method, *first, *args, **options))
            for member, first in zip(self.members, own, strict=True)
        ]
        try:
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if pending and not any(isinstance(task.exception(), MemberLost) for task in done):
                # A collective broke off for those that are left: the one that died may be known a moment later.
                await asyncio.wait(pending, timeout=_GRACE_S)
            failures = [task.exception() for task in tasks if task.done() and task.exception()]
        finally:
            for task in tasks:
                task.cancel()
        if failures:
            raise self._verdict(failures)
        return [task.result() for task in tasks]

    def _verdict(self, failures: Sequence[BaseException]) -> BaseException:
        """What the failures of some members are for the whole group."""
        for kind in (StartFailed, MemberLost, WeightSyncError, PayloadLost):
            if found := [failure for failure in failures if isinstance(failure, kind)]:
                # One that cannot start but has started before: the place may be to blame.
                lost = kind is MemberLost or (kind is StartFailed and self.num_restarts)
                return self._lost(found[0]) if lost else found[0]
        explained = [failure for failure in failures if isinstance(failure.__cause__, RayTaskError)]
        broken = [failure for failure in explained if not isinstance(failure.__cause__.cause, OpdError)]
        # One rank alone has nobody to lose; of several, an error that is not ours is a collective that broke.
        if len(self) > 1 and len(broken) == len(failures):
            return self._lost(broken[0])
        return next((failure for failure in failures if failure not in broken), failures[0])

    def _lost(self, error: BaseException | str) -> GroupLost:
        self.last_loss = str(error)
        return GroupLost(str(error), self.room)
