"""Runs beside a running event loop, and the signals that end them wherever they are."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from opd_ray.run.signals import run, stop_signals


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.fixture
def before() -> Any:
    """The handlers before the test, that of SIGINT as it is by default: whoever starts the tests in the
    background has it ignored, and Ray, started in the same process, has one of its own for SIGTERM."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield handlers()
    signal.signal(signal.SIGINT, was)


def beside_a_loop(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What `run` makes of a coroutine where this thread's loop is running, as in a notebook."""

    async def cell() -> Any:
        return run(main())

    return asyncio.run(cell())


def alone(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return run(main())


def signalled(number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal, which the main thread gets."""
    os.kill(os.getpid(), number)


async def where() -> threading.Thread:
    await asyncio.sleep(0)
    return threading.current_thread()


def test_a_running_loop_is_no_obstacle() -> None:
    """The bug: in a notebook `train` ended with "asyncio.run() cannot be called from a running event loop"."""
    assert alone(where) is threading.main_thread()
    assert beside_a_loop(where) is not threading.main_thread()

    async def failing() -> None:
        raise ValueError("as it is")

    for way in (alone, beside_a_loop):
        with pytest.raises(ValueError, match="as it is"):
            way(failing)


@pytest.mark.parametrize("way", [alone, beside_a_loop])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_run_to_end(way: Callable[..., Any], number: signal.Signals, before: Any) -> None:
    async def saving() -> str:
        with stop_signals() as stopping:
            signalled(number)
            await asyncio.wait_for(stopping.wait(), 20)
            return "saved"

    assert way(saving) == "saved"
    assert handlers() == before


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kernel", [False, True])
def test_the_second_one_ends_a_run_beside_a_loop_at_once(before: Any, first: signal.Signals, kernel: bool) -> None:
    """The bug: beside a loop of asyncio.run the second only cancelled that loop, which stood still until the run's
    end."""
    ended = threading.Event()

    async def stubborn() -> None:
        with stop_signals() as stopping:
            try:
                signalled(first)
                await asyncio.wait_for(stopping.wait(), 20)
                signalled(signal.SIGINT)
                await asyncio.wait_for(asyncio.Event().wait(), 20)
            finally:
                ended.set()

    async def cell() -> None:
        if kernel:  # a notebook's has it in place of asyncio's
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run(stubborn())

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert time.monotonic() - began < 10
    assert ended.is_set()
    assert handlers() == before


def test_what_listens_to_no_signal_is_cancelled_by_the_first() -> None:
    ended = threading.Event()

    async def deaf() -> None:
        try:
            signalled(signal.SIGINT)
            await asyncio.wait_for(asyncio.Event().wait(), 20)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        beside_a_loop(deaf)
    assert ended.is_set()


def test_beside_the_loop_of_another_thread_signals_stay_with_the_main_one() -> None:
    async def listening() -> bool:
        with stop_signals() as stopping:
            return stopping.is_set()

    said: list[bool] = []
    thread = threading.Thread(target=lambda: said.append(beside_a_loop(listening)))
    thread.start()
    thread.join(20)
    assert said == [False]
