"""Asks a task for verdicts that may hang, in a few processes that can be killed.

One answer of a model, `\\boxed{9^{9^{9^{9}}}}`, keeps sympy busy for ever with the GIL held: in the process that
samples it would stop engine, event loop and heartbeat.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from opd_ray.errors import RunError
from opd_ray.progress import watched
from opd_ray.rooms import logs
from opd_ray.tasks import Task

_log = logs.get(__name__)
_PROCESSES = 4
_START_S = 120  # imports from a shared disk, on a node where everything starts at the same time
_GRACE_S = 2  # a process ends its worker itself; this is for one that is stopped


class Judge:
    """A task's verdicts, in the order of the questions; None where there is none, which counts as wrong.

    A task without ``verify_limit_s`` is asked in line; one with it in processes, which start when first needed.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._limit_s = getattr(task, "verify_limit_s", None)
        self._threads = ThreadPoolExecutor(_PROCESSES, thread_name_prefix="judge")  # each waits for one process
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._closed = False

    async def verify(self, answers: Sequence[tuple[str, Any]]) -> list[bool | None]:
        """Is each (response, row) right? Leaves the event loop free."""
        if self._limit_s is None:
            return [self.task.verify(*answer) for answer in answers]
        return self._verdicts(await asyncio.gather(*map(asyncio.wrap_future, self._ask("verify", answers))))

    def ask(self, method: str, questions: Sequence[tuple[Any, ...]]) -> list[bool | None]:
        """The same of any method of the task that says yes or no, for those without an event loop."""
        if self._limit_s is None:
            return [getattr(self.task, method)(*question) for question in questions]
        answers = watched(self._ask(method, questions), "answers judged", len(questions))
        return self._verdicts([answer.result() for answer in answers])

    def close(self) -> None:
        """Ends the processes; what is still asked has no verdict."""
        self._closed = True
        for process in list(self._all):
            process.kill()
        self._threads.shutdown(wait=False)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, questions: Sequence[tuple[Any, ...]]) -> list[Future[bool | str]]:
        return [self._threads.submit(self._answer, method, question) for question in questions]

    def _answer(self, method: str, question: tuple[Any, ...]) -> bool | str:
        if self._closed:
            return "the judge was closed"
        try:
            process = self._idle.pop()
        except IndexError:
            process = self._start()
        try:
            answer = process.answer(method, question)
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            process.kill()
            self._all.discard(process)
            return f"the process that judges gave no answer ({type(error).__name__})"
        self._idle.append(process)
        return answer

    def _start(self) -> _Process:
        process = _Process(self._limit_s)
        self._all.add(process)
        try:
            process.begin(self.task)
        except BaseException:
            process.kill()
            self._all.discard(process)
            if not self._closed:
                raise
        if self._closed:
            process.kill()
        return process

    def _verdicts(self, answers: Sequence[bool | str]) -> list[bool | None]:
        reasons = [answer for answer in answers if isinstance(answer, str)]
        if reasons:
            counts = len(reasons), len(answers)
            _log.warning("%d of %d answers without a verdict, which counts as no: %s", *counts, reasons[0])
        return [None if isinstance(answer, str) else answer for answer in answers]


class _Process:
    """One process of `opd_ray.tasks.judge_process`.

    Not one of multiprocessing, which would run the driver's ``__main__`` a second time. It ends with its parent: the
    socket closes, and a worker that does not look at it is at its limit soon.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(limit_s + _GRACE_S), 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "opd_ray.tasks.judge_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._line = Connection(ours.detach())

    def begin(self, task: Task) -> None:
        """Loads the task. Raises RunError."""
        try:
            self._line.send((task, self._limit_s))
            problem = self._receive(_START_S)
        except (EOFError, OSError) as error:
            problem = f"it gave no answer within {_START_S} s, or died ({type(error).__name__}); see its stderr"
        if problem:
            raise RunError(f"the process that judges answers could not start {type(task).__name__}: {problem}")

    def answer(self, method: str, question: tuple[Any, ...]) -> bool | str:
        self._line.send((method, question))
        return self._receive(self._limit_s + _GRACE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self, timeout_s: float) -> Any:
        if not self._line.poll(timeout_s):
            raise TimeoutError
        return self._line.recv()
