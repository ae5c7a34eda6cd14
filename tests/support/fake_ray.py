"""Ray's actors and objects in this process, and a clock that does not wait.

Pools and groups under test are the real ones; the actors behind their handles are plain objects, and a test says who
dies, stops, or loses which object, and when. Time passes only while everything waits, so that deadlines of minutes
take no time, and the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any
from unittest import mock

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from fake_shelves import Objects, Ref
from opd_ray.errors import PayloadLost
from opd_ray.messages import Span
from opd_ray.rooms.room import Member


class _Clock(selectors.DefaultSelector):
    """A selector that lets time pass instead of waiting."""

    def __init__(self, most_s: float) -> None:
        super().__init__()
        self.now = time.monotonic()
        self._end = self.now + most_s

    def time(self) -> float:
        self.now += 1e-7  # it never stands still, as no clock does
        return self.now

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout != 0:
            assert timeout is not None, "everything waits, and for nothing that will come"
            self.now += timeout + 1e-6
            assert self.now < self._end, "the run does not come to its end"
        return events


def _at_once(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """What other threads do would take no time on this clock."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


def run(main: Coroutine[Any, Any, Any], most_s: float = 100_000.0) -> Any:
    """Runs ``main`` on a clock that does not wait, for at most so many of its seconds."""
    clock = _Clock(most_s)
    with (
        mock.patch("time.monotonic", clock.time),
        mock.patch("opd_ray.rooms.threads.start", _at_once),
        mock.patch("ray.kill", kill),
        mock.patch("ray.nodes", nodes),
        mock.patch("opd_ray.placement.nodes.ends_of", ends_of),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner,
    ):
        return runner.run(main)


_NODES: dict[str, bool] = {}
"""Is it alive?"""


def nodes() -> list[dict[str, Any]]:
    """What ``ray.nodes`` returns."""
    known = {"Resources": {"CPU": 2.0}, "NodeManagerHostname": "node", "NodeManagerAddress": "127.0.0.1"}
    return [{"NodeID": node, "Alive": alive, **known} for node, alive in _NODES.items()]


def ends_of(handles: list[Handle]) -> list[float | None]:
    """What ``opd_ray.placement.nodes.ends_of`` returns."""
    ends = [handle._actor.ends_at for handle in handles]
    return [None if end is None else end - time.monotonic() for end in ends]


def kill(handle: Handle) -> None:
    """What ``ray.kill`` does."""
    handle._actor.die("it was killed with ray.kill")


class Store(Objects):
    """Objects that can get lost."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: set[Ref] = set()

    def reserve(self) -> Ref:
        """A ref to what ``fill`` will bring."""
        return Ref(next(self._numbers))

    def fill(self, ref: Ref, value: Any) -> None:
        self._objects[ref] = value

    def lose(self, *refs: Ref) -> None:
        self._gone.update(refs)

    def lose_all(self) -> None:
        self.lose(*self._objects)

    def holds(self, ref: Ref) -> bool:
        return ref not in self._gone

    def get(self, ref: Any) -> Any:
        """Raises ObjectLostError, as ray.get does."""
        if ref in self._gone:
            raise ObjectLostError("00" * 28, "", "")
        return super().get(ref)

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if lost := [arg for arg in args if isinstance(arg, Ref) and not self.holds(arg)]:
            raise PayloadLost(f"checkpoint: {lost[0]} is gone")
        return await super().__call__(function, *args)


class Actor:
    """An object whose methods are called from afar; it starts at its first call, when ``may_start`` is set."""

    def __init__(self, name: str, make: Callable[[Actor], Any], world: World, serial: bool) -> None:
        self.name, self._make, self.world = name, make, world
        self._turn = asyncio.Lock() if serial else contextlib.nullcontext()
        self.node = f"node-of-{name}"
        _NODES[self.node] = True
        self.may_start, self.moves = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.moves.set()
        self.is_dead = False
        self.inside: Any = None
        """What was made; None before it has started."""
        self.ends_at: float | None = None
        """When its node goes, where that is announced."""
        self._death: RayActorError | None = None
        self._answers: set[asyncio.Future[Any]] = set()
        self.ahead_s = 1000.0 * len(_NODES)
        """Of its node's clock, before the driver's."""
        self.did: list[Span] = []
        """What it was at since it was asked last, if it does one thing at a time."""

    @property
    def role(self) -> str:
        return re.sub(r"-\d+(-again-\d+)?$", "", self.name)

    def die(self, why: str = "its node is gone", *, with_its_node: bool = False) -> None:
        """As a process does, with all that it was at; what it returned before stays."""
        _NODES[self.node] = not with_its_node
        # Ray says the same of every death before the first answer, whatever its cause.
        end = "" if self.inside else " The actor never ran - it was cancelled before it started running."
        self._end(RayActorError(error_msg=f"The actor died unexpectedly before finishing this task. {why}.{end}"), why)

    def announce(self, seconds: float) -> None:
        """Its node will be gone by then, and says so."""
        self.ends_at = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds, lambda: self.die(with_its_node=True))

    def refuse(self, why: str) -> None:
        """As one does whose constructor raises."""
        self._end(RayActorError(error_msg=f"The actor died: {why}", actor_init_failed=True), why)

    def stop(self) -> None:
        """As SIGSTOP does: nothing answers until ``go_on``."""
        self.moves.clear()

    def go_on(self) -> None:
        self.moves.set()

    def call(self, method: str, args: tuple[Any, ...], num_returns: int, at_once: bool) -> Any:
        answer = asyncio.get_running_loop().create_future()
        payload = self.world.objects.reserve() if num_returns == 2 else None
        self._answers.add(answer)
        if self._death is not None:
            self._fail(answer, self._death)
        else:
            task = asyncio.get_running_loop().create_task(self._work(method, args, answer, payload, at_once))
            self.world.tasks.add(task)
            task.add_done_callback(self.world.tasks.discard)
        return answer if payload is None else (answer, payload)

    async def _work(
        self,
        method: str,
        args: tuple[Any, ...],
        answer: asyncio.Future[Any],
        payload: Ref | None,
        at_once: bool,
    ) -> None:
        try:
            await self._start()
            async with contextlib.nullcontext() if at_once else self._turn:
                self.world.before(self, method)
                await self.moves.wait()
                if self.is_dead:
                    return
                values = [self.world.objects.get(arg) if isinstance(arg, Ref) else arg for arg in args]
                began = time.monotonic()
                outcome = getattr(self.inside, method)(*values)
                if asyncio.iscoroutine(outcome):
                    outcome = await outcome
                if isinstance(self._turn, asyncio.Lock) and not at_once:
                    self.did.append(Span(method, began + self.ahead_s, time.monotonic() - began, {}))
            if payload is not None:
                outcome, value = outcome
                self.world.objects.fill(payload, value)
            await self.moves.wait()
            self.world.after(self, method)
        except Exception as error:
            self._fail(answer, RayTaskError(method, f"Traceback:\n{error!r}", error, "python", 1, "host"))
        else:
            if not answer.done():
                answer.set_result(outcome)

    async def _start(self) -> None:
        await self.may_start.wait()
        if self.inside is None and not self.is_dead:
            try:
                self.inside = self._make(self)
            except Exception as error:
                self.refuse(repr(error))

    def _end(self, death: RayActorError, why: str) -> None:
        if not self.is_dead:
            self.is_dead, self._death, self.why = True, death, why
            for answer in self._answers:
                self._fail(answer, death)

    @staticmethod
    def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
        if not answer.done():
            answer.set_exception(error.as_instanceof_cause() if isinstance(error, RayTaskError) else error)
            answer.exception()  # nobody may be waiting any more


class Handle:
    """What Ray gives for an actor."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> _Method:
        return _Method(self._actor, method)


class _Method:
    def __init__(self, actor: Actor, method: str, num_returns: int = 1, at_once: bool = False) -> None:
        self._actor, self._method, self._num_returns, self._at_once = actor, method, num_returns, at_once

    def options(self, *, num_returns: int = 1, concurrency_group: str | None = None) -> _Method:
        return _Method(self._actor, self._method, num_returns, concurrency_group is not None)

    def remote(self, *args: Any) -> Any:
        return self._actor.call(self._method, args, self._num_returns, self._at_once)


class World:
    """The actors and objects of one test."""

    def __init__(self) -> None:
        self.objects = Store()
        self.actors: list[Actor] = []
        """All that were ever started, in order."""
        self.before: Callable[[Actor, str], None] = lambda actor, method: None
        """Called before every call of an actor's method."""
        self.after: Callable[[Actor, str], None] = lambda actor, method: None
        """Called when a method has returned, before its answer is known."""
        self.starting: Callable[[Actor], None] = lambda actor: None
        """Called with every new actor."""
        self.tasks: set[asyncio.Task[None]] = set()

    def spawning(
        self, role: str, make: Callable[[Actor], Any], *, serial: bool = False
    ) -> Callable[[int, int], Member]:
        """Starts actors of a role, whose object is ``make(actor)``; ``serial`` ones work off one call after another,
        but for heartbeats."""

        def spawn(number: int, restart: int) -> Member:
            actor = Actor(f"{role}-{number}" + (f"-again-{restart}" if restart else ""), make, self, serial)
            self.actors.append(actor)
            self.starting(actor)
            return Member(Handle(actor), actor.name)

        return spawn

    def living(self, role: str | None = None) -> list[Actor]:
        return [actor for actor in self.actors if not actor.is_dead and role in (None, actor.role)]

    def named(self, name: str) -> Actor:
        return next(actor for actor in self.actors if actor.name == name)


def actor_of(member: Member) -> Actor:
    return member.handle._actor


async def until(condition: Callable[[], Any], most: int = 10_000) -> None:
    """Waits, turn by turn of the event loop and hundredth by hundredth of a second, for what others do."""
    for _ in range(most):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("what was waited for never came")
