"""Signals that ask a run to end: SIGTERM of a job that is stopped or of a machine that goes away, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that a signal to end sets; the second signal does what it always did."""
    stopping = asyncio.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])

    def stop() -> None:
        stopping.set()
        restore()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield stopping
    finally:
        restore()
