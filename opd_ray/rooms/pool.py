"""Rooms of actors, and what becomes of a call whose actor is lost.

    Pool    workers without a state of the run (generators, scorers, the recorder): a call whose worker dies, hangs or
            loses its engine goes to another one; the pool may grow and shrink
    Group   workers that hold state (learner ranks, scorers that follow the student): a loss is the group's loss

Who replaces a lost worker is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from opd_ray.errors import ActorError, MemberLost
from opd_ray.messages import PoolSize
from opd_ray.rooms.room import Member, Room, Spawn
from opd_ray.rooms.together import together

_MOST_DEATHS = 5
"""Workers that one call may take down before it is held to be the cause; a long one may meet some spot nodes' end."""
_AHEAD = 2
"""Calls that a worker is given, in those that it works on at once: as many again lie ready, so that it never idles.
The others wait in the pool, for whoever has room first, and count against nobody's deadline: given out at once, a
queue of 256 calls made 24 healthy scorers miss theirs."""


class Pool(Room):
    """Interchangeable workers, between a minimum and a maximum of them."""

    holds_state = False

    def __init__(
        self,
        room: str,
        spawn: Spawn,
        size: PoolSize,
        deadline_s: float,
        *,
        needs_weights: bool = False,
        calls_at_once: int = 1,
        pings: str | None = None,
    ) -> None:
        """``needs_weights``: a worker that is up is of use only when it has the student's current weights."""
        super().__init__(room, spawn, size, deadline_s, pings)
        self.calls_at_once = calls_at_once
        """How many a worker works on at the same time; a run may have others than the one before."""
        self.target, self.needs_weights = size.start, needs_weights
        self.num_reissued = 0
        """Calls that went to another worker because theirs was lost."""
        self.on_loss: Callable[[Pool, Member, str], None] | None = None
        """Told of every worker that is lost; without it, a loss is the caller's failure."""
        self.has_been_up = False
        """Has any worker ever come up?"""
        self._begun_with: tuple[Any, ...] | None = None
        self._numbers = itertools.count()
        self._waiting: deque[asyncio.Event] = deque()
        """Calls that wait for a worker, in their order; the first one's event is set when it should look again."""
        for _ in range(size.start):
            self.grow()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def grow(self) -> Member:
        """Starts one more actor."""
        member = self._spawn(next(self._numbers), 0)
        self.members.append(member)
        return member

    async def bring_up(self, member: Member, deadline_s: float) -> None:
        """Waits until an actor has started. It is then ready, or about to join those that have the weights."""
        member.node = await self.ask(member, "node", deadline_s=deadline_s)
        self.has_been_up = True
        told = None
        while told is not self._begun_with:  # another run may begin while it is told of this one
            told = self._begun_with
            await self.ask(member, "begin", *told, deadline_s=deadline_s)
        if member.state == "starting":
            self.admit(member) if not self.needs_weights else member.become("joining")

    async def begin(self, *args: Any, deadline_s: float) -> None:
        """Another run: tells all members, and those that come later."""
        self._begun_with = args
        await self.call_all("begin", *args, deadline_s=deadline_s)

    async def up(self, deadline_s: float) -> None:
        """Brings up every actor that is starting."""
        await together(*(self.bring_up(member, deadline_s) for member in self.those("starting")))

    def admit(self, member: Member) -> None:
        """Gives a member work from now on."""
        member.become("ready")
        self._wake()

    def lose(self, member: Member, cause: str) -> None:
        """A member is dead, or of no use: it is ended, and whoever replaces it is told. Raises MemberLost where nobody
        does."""
        if member.state != "gone":
            self.last_loss = cause
            self.end(member)
            if self.on_loss is not None:
                self.on_loss(self, member, cause)
        if self.on_loss is None:
            raise MemberLost(cause)

    async def call(self, method: str, *args: Any, payload: bool = True) -> Any:
        """What the least loaded member answers (as ``ask``); waits for one that is ready and has room.

        A call whose member is lost goes to another one, so ``method`` must bear being called twice.
        Raises ActorError when a member raises, or when the call takes down one member after another.
        """
        for death in itertools.count(1):
            member = await self._with_room(first=death > 1)
            try:
                return await self.ask(member, method, *args, payload=payload)
            except MemberLost as error:
                self.lose(member, str(error))
                if death == _MOST_DEATHS:
                    raise ActorError(f"{self.room}: one call took down {death} workers, the last: {error}") from error
                self.num_reissued += 1
        raise AssertionError("unreachable")

    async def call_all(self, method: str, *args: Any, deadline_s: float | None = None) -> None:
        """Calls all members that are there; those that are lost meanwhile are replaced."""

        async def call(member: Member) -> None:
            try:
                await self.ask(member, method, *args, deadline_s=deadline_s)
            except MemberLost as error:
                self.lose(member, str(error))

        await together(*map(call, self.those("ready", "joining")))

    async def _with_room(self, first: bool) -> Member:
        """The least loaded member that has room, when all that came before have theirs; ``first``: this one was there
        before and goes ahead of them. It must be given its call before anything else is awaited."""
        turn = asyncio.Event()
        self._waiting.insert(0 if first else len(self._waiting), turn)
        try:
            while True:
                if self.on_loss is None and not self.members:
                    raise ActorError(f"{self.room}: no worker is left; the last was lost: {self.last_loss}")
                if self._waiting[0] is turn and (ready := self.those("ready")):  # who is behind looks at nobody
                    least = min(ready, key=lambda each: each.num_calls)
                    if least.num_calls < _AHEAD * self.calls_at_once:
                        return least
                turn.clear()
                await turn.wait()
        finally:
            self._waiting.remove(turn)
            self._wake()

    async def ask(self, *call: Any, **options: Any) -> Any:
        try:
            return await super().ask(*call, **options)
        finally:
            self._wake()  # whatever it was that ended, a broadcast as well: there is room again

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()
