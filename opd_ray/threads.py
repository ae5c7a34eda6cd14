"""Threads for calls to what may hang, as a disk of another machine: none keeps the process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


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
