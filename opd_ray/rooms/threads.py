"""Threads for calls to what may hang and has no deadline of its own: a disk of another machine, torch's and NCCL's
rendezvous with a process that is stopped. None keeps the process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

_T = TypeVar("_T")


def in_thread(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """The outcome of ``function(*args)``; a thread that nobody waits for any more is left to itself."""
    return asyncio.wrap_future(start(function, *args))


def within(timeout_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises, for those who have no event loop; TimeoutError when it takes longer."""
    done = start(call)
    wait([done], timeout_s)
    if not done.done():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return done.result()


def start(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Calls a function in a thread of its own."""
    done: Future[Any] = Future()
    done.set_running_or_notify_cancel()  # whoever gives up must not make set_result() fail later

    def run() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=getattr(function, "__name__", "call"), daemon=True).start()
    return done
