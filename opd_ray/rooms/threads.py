"""Threads for calls to what may hang and has no deadline of its own: a disk of another machine, torch's and NCCL's
rendezvous with a process that is stopped. None keeps the process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Daemons(Executor):
    """A thread for each call."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()  # whoever gives up must not make set_result() fail later

        def run() -> None:
            try:
                done.set_result(function(*args, **kwargs))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name=getattr(function, "__name__", "call"), daemon=True).start()
        return done


_DAEMONS = _Daemons()


def in_thread(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """The outcome of ``function(*args)``; a thread that nobody waits for any more is left to itself."""
    return asyncio.get_running_loop().run_in_executor(_DAEMONS, function, *args)


def within(timeout_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises, for those who have no event loop; TimeoutError when it takes longer."""
    done = _DAEMONS.submit(call)
    wait([done], timeout_s)
    if not done.done():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return done.result()
