"""Where the functions of :mod:`opd_ray.snapshots.files` run: beside the files, or beside the payloads.

Files that only this node has are written and read in threads of this process, and payloads are mapped from its object
store. Files that every node reaches are by tasks of Ray, wherever their payload is. A task would do for the first as
well, but Ray ends idle workers after a second: each checkpoint of a small model would start its processes anew, which
takes longer than all the writing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError

from opd_ray.errors import DeadlineError, OpdError
from opd_ray.rooms.room import explained
from opd_ray.rooms.threads import in_thread

_AT_ONCE = 2
"""Functions that run at the same time: the loop needs the processors, too."""


class FileCalls:
    """Calls functions with the values of the refs among their arguments."""

    def __init__(self, *, local: bool, deadline_s: float) -> None:
        """``local``: only this node has the files."""
        self._local, self._deadline_s = local, deadline_s
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function(*args)`` returns; raises what it raises."""
        return (await self._call(function, False, args))[0]

    async def payload(self, function: Callable[..., Any], *args: Any) -> ObjectRef:
        """A ref to what ``function(*args)`` returns; raises what it raises."""
        return (await self._call(function, True, args))[1]

    async def _call(self, function: Callable[..., Any], stays: bool, args: tuple[Any, ...]) -> tuple[Any, ObjectRef]:
        where = f"checkpoint: {function.__name__}"
        async with self._at_once:
            try:
                async with asyncio.timeout(self._deadline_s):
                    if self._local:
                        return await in_thread(self._here, function, stays, args)
                    answer, payload = _task().remote(function, stays, *args)
                    return await answer, payload
            except (TimeoutError, GetTimeoutError):
                raise DeadlineError(f"{where} did not end within {self._deadline_s:g} s (deadlines.train_s)") from None
            except RayError as error:
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, OpdError) else explained(where, error) from error

    def _here(self, function: Callable[..., Any], stays: bool, args: tuple[Any, ...]) -> tuple[Any, Any]:
        values = [ray.get(arg, timeout=self._deadline_s) if isinstance(arg, ObjectRef) else arg for arg in args]
        answer, payload = _answer_and_payload(function, stays, *values)
        return answer, ray.put(payload) if stays else None


def _answer_and_payload(function: Callable[..., Any], stays: bool, *args: Any) -> tuple[Any, Any]:
    """What ``function(*args)`` returns, as the answer or, where it ``stays`` in the object store, as the payload."""
    value = function(*args)
    return (None, value) if stays else (value, None)


@functools.cache
def _task() -> Any:
    """One task for all functions: Ray starts worker processes for each task function, and keeps them apart. Made once:
    each that is made stays in Ray's tables, which grew by three keys with every file that was written."""
    return ray.remote(_answer_and_payload).options(num_returns=2, num_cpus=0)
