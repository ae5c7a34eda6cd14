"""Where the functions of :mod:`opd_ray.snapshots.files` run: beside the files, or beside the payloads.

    InThreads   on this node, for files that only it has; payloads are mapped from its object store
    InTasks     wherever their payload is, for files that every node reaches

A task would do for the first as well, but Ray ends idle workers after a second: each checkpoint of a small model would
start its processes anew, which takes longer than all the writing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from opd_ray.errors import DeadlineError, OpdError
from opd_ray.rooms.room import explained
from opd_ray.rooms.threads import in_thread
from opd_ray.snapshots import Runner
from opd_ray.snapshots.files import answer_or_payload

_AT_ONCE = 2
"""Functions that run at the same time: the loop needs the processors, too."""


def runner(*, local: bool, deadline_s: float) -> Runner:
    """``local``: only this node has the files."""
    return InThreads(deadline_s) if local else InTasks(deadline_s)


class InThreads:
    """Runs functions in threads of this process, none of which keeps it from ending."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._run(function, lambda: function(*map(self._value, args)))

    async def payload(self, function: Callable[..., Any], *args: Any) -> ObjectRef:
        return await self._run(function, lambda: ray.put(function(*map(self._value, args))))

    def _value(self, arg: Any) -> Any:
        return ray.get(arg, timeout=self._deadline_s) if isinstance(arg, ObjectRef) else arg

    async def _run(self, function: Callable[..., Any], call: Callable[[], Any]) -> Any:
        where = f"checkpoint: {function.__name__}"
        async with self._at_once:
            try:
                return await asyncio.wait_for(in_thread(call), self._deadline_s)
            except (TimeoutError, GetTimeoutError):
                raise _too_late(where, self._deadline_s) from None
            except RayError as error:
                raise explained(where, error) from error


class InTasks:
    """Runs functions as tasks of Ray."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        answer, _ = await self._run(function, False, args)
        return answer

    async def payload(self, function: Callable[..., Any], *args: Any) -> ObjectRef:
        _, payload = await self._run(function, True, args)
        return payload

    async def _run(self, function: Callable[..., Any], stays: bool, args: tuple[Any, ...]) -> tuple[Any, ObjectRef]:
        async with self._at_once:
            answer, payload = _task().remote(function, stays, *args)
            return await self._receipt(function, answer), payload

    async def _receipt(self, function: Callable[..., Any], ref: ObjectRef) -> Any:
        where = f"checkpoint: the task {function.__name__}"
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), self._deadline_s)
        except TimeoutError:
            raise _too_late(where, self._deadline_s) from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, OpdError) else explained(where, error) from error
        except RayError as error:
            raise explained(where, error) from error


@functools.cache
def _task() -> Any:
    """One task for all functions: Ray starts worker processes for each task function, and keeps them apart. Made once:
    each that is made stays in Ray's tables, which grew by three keys with every file that was written."""
    return ray.remote(answer_or_payload).options(num_returns=2, num_cpus=0)


def _too_late(where: str, deadline_s: float) -> DeadlineError:
    return DeadlineError(f"{where} did not end within {deadline_s:g} s (deadlines.train_s)")
