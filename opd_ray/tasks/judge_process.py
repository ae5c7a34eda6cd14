"""The process behind a `opd_ray.tasks.judge.Judge`: loads the task once, then forks a worker that gives the verdicts.

A worker that is over its limit is killed by the kernel: sympy holds the GIL through a power tower, so no handler or
thread of Python would ever run. Forking its successor costs milliseconds, where a new process would import sympy again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

_MEMORY_BYTES = 1 << 30
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves until the other end of the socket is gone."""
    line = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; our parent ends us
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # that of the thread which started us came along
    task, limit_s = line.recv()
    try:
        task.load()
    except Exception as error:
        line.send(f"{type(error).__name__}: {error}")
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    line.send(None)
    while True:
        worker = os.fork()
        if not worker:
            try:
                _work(line, task, limit_s)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code == 0:
            return
        line.send(f"it took more than {limit_s:g} s" if code == -signal.SIGALRM else f"it died (exit code {code})")


def _work(line: Connection, task: Any, limit_s: float) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = line.recv()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            answer = _answer(task, method, arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            line.send(answer)


def _answer(task: Any, method: str, arguments: tuple[Any, ...]) -> bool | str:
    """Yes, no, or why there is no answer."""
    try:
        return bool(getattr(task, method)(*arguments))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
