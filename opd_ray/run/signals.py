"""Signals that ask a run to end: SIGTERM of a job that is stopped or of a machine that goes away, Ctrl-C.

Python hands them to the main thread. A run is there, too, unless an event loop runs there already (a notebook's, that
of a coroutine that calls ``train``): then it has a thread of its own, and the main thread passes on what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent import futures
from contextvars import ContextVar
from typing import Any, TypeVar

from opd_ray.rooms.threads import start

_T = TypeVar("_T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY_S = 0.5


class _Elsewhere:
    """How the thread that gets the signals reaches a run in another."""

    def __init__(self) -> None:
        self.cancel: Callable[[], object] = lambda: None
        self.stop: Callable[[], object] = lambda: self.cancel()
        """Asks it to end; by default what does not know how to is cancelled."""


_elsewhere: ContextVar[_Elsewhere | None] = ContextVar("elsewhere", default=None)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run``, also where this thread has a running event loop, which then stands still until ``main`` ends."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    here = _Elsewhere()

    async def alone() -> _T:
        _elsewhere.set(here)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        here.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        return await main

    def again(number: int) -> None:
        """Also where what it always did is to cancel the loop that stands still."""
        here.cancel()
        signal.raise_signal(number)

    with contextlib.ExitStack() as handled:
        if _on_main_thread():
            handled.enter_context(_handled(again))
            handled.enter_context(_handled(lambda _: here.stop()))
        waited_for = threading.Event()  # a signal that comes before would interrupt nobody who could cancel the run
        done = start(lambda: waited_for.wait() and asyncio.run(alone()))
        try:
            waited_for.set()
            while not done.done():  # a signal just before a lock is waited for without end would be noticed at its end
                futures.wait([done], _LOOK_EVERY_S)
            return done.result()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except KeyboardInterrupt:  # what the second signal always did
            done.exception()
            raise


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that a signal to end sets; the second signal does what it always did."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(*_: int) -> None:
        loop.call_soon_threadsafe(stopping.set)

    if not _on_main_thread():
        if there := _elsewhere.get():
            there.stop = stop
        yield stopping
        return
    with _handled(stop):
        yield stopping


@contextlib.contextmanager
def _handled(stop: Callable[[int], object]) -> Iterator[None]:
    """Calls ``stop`` with the first signal to end, on the main thread; what comes after it is handled as before."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number in _SIGNALS:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: of a handler that is not Python's

    def handle(number: int, _: object) -> None:
        restore()
        stop(number)

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
