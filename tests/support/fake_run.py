"""Driver processes that tests kill: the real driver on a real Ray, with fake engines and a fake learner, or without.

    with Drivers(head.environment) as drivers:
        driver = drivers.start(["--run-dir", ...], log, kill={"point": "sealed", "passing": 2})
        assert driver.wait() == -signal.SIGKILL

One process imports everything once and forks a driver for each start, which then runs `opd-ray train`. A driver may be
told to kill itself, by SIGKILL, when it comes by one of POINTS. This module is imported by workers, too: no torch here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import inspect
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opd_ray.messages import GenerationRequest
from opd_ray.snapshots.storage import FileFact, Storage
from uniform_scores import UniformScores
from uniform_tokens import VOCAB_SIZE, UniformTokens

POINTS = (
    "started",  # the rooms' actors were asked for, none is up
    "restoring",  # the learner gets its state back
    "training",  # an optimizer step
    "broadcasting",  # the new weights are on their way
    "logged",  # the rollout log has a step that no checkpoint has
    "part written",  # a checkpoint has some of its files
    "sealing",  # it has all but its state.json, which lies there under another name
    "sealed",  # it is there, and older ones beyond checkpoint.keep are, too
    "pruning",  # an old one has lost its state.json but nothing else
    "exporting",  # all steps are done
)
FULL = "disk-is-full"
"""While a file of this name lies beside the checkpoints' directory, a learner's part cannot be written there."""


# ---- what takes the place of engines, tokenizer and disk ----


class VersionedEngine(UniformTokens):
    """Its tokens depend on the version of the weights that it holds, as a model's would."""

    def _token(self, request: GenerationRequest, position: int) -> int:
        version = self._versions[request.request_id][position]
        return random.Random(f"{request.seed}/{version}/{position}").randrange(VOCAB_SIZE)


class FewWords:
    """Decodes what fake engines generate."""

    def batch_decode(self, sequences: list[Any], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(token) for token in tokens) for tokens in sequences]


class FillingStorage(Storage):
    """A disk that has no space left for the second half of a file, while there is a file FULL."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FillingStorage, (self.location,)

    def write(self, name: str, chunks: Any) -> FileFact:
        if "learner" not in name or not Path(self.location).with_name(FULL).exists():
            return super().write(name, chunks)
        return super().write(name, _until_full(chunks))


def _until_full(chunks: Any) -> Iterator[Any]:
    yield next(iter(chunks))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_generation_engine(path: str, rollout: Any, max_context_tokens: int) -> VersionedEngine:
    return VersionedEngine(max_num_seqs=rollout.max_num_seqs, max_context_tokens=max_context_tokens)


def make_scoring_engine(scorer: Any, max_context_tokens: int | None) -> UniformScores:
    return UniformScores()


def load_tokenizer(path: str) -> FewWords:
    return FewWords()


def _put_fakes() -> None:
    from fake_learner import FakeLearner
    from opd_ray.placement import launch
    from opd_ray.run import train as run

    launch.make_generation_engine, launch.make_scoring_engine = make_generation_engine, make_scoring_engine
    launch.load_tokenizer, launch.Learner = load_tokenizer, FakeLearner
    run.Storage = FillingStorage


# ---- where a driver kills itself ----


class _Kill:
    """SIGKILL at the n-th ``passing`` of ``point``, ``delay_s`` later."""

    def __init__(self, point: str, passing: int = 1, delay_s: float = 0.0) -> None:
        assert point in POINTS
        self._point, self._left, self._delay_s = point, passing, delay_s

    def passes(self, point: str) -> None:
        if point != self._point:
            return
        self._left -= 1
        if self._left == 0 and self._delay_s:
            threading.Timer(self._delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _put_points(kill: _Kill) -> None:
    """Lets the driver's own functions say where it is."""
    from opd_ray.placement import launch
    from opd_ray.rooms.group import Group
    from opd_ray.run import driver
    from opd_ray.snapshots import Shelf, write_arrays, write_batch
    from opd_ray.snapshots.calls import FileCalls
    from opd_ray.snapshots.keeper import Keeper
    from opd_ray.watch import observers
    from opd_ray.weights.delivery import Delivery

    def say(
        owner: Any, name: str, point: str, *, first: bool = False, when: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Makes a function say that it is at a point: when it is done, or before it begins."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def telling(*args: Any, **kwargs: Any) -> Any:
            if first and when(*args):
                kill.passes(point)
            result = function(*args, **kwargs)
            if not first and when(*args):
                kill.passes(point)
            return result

        @functools.wraps(function)
        async def telling_later(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            if when(*args):
                kill.passes(point)
            return result

        setattr(owner, name, telling_later if inspect.iscoroutinefunction(function) and not first else telling)

    say(launch, "start_rooms", "started")
    say(Keeper, "restore", "restoring", first=True)
    say(Group, "call_all", "training", first=True, when=lambda _, method, *__: method == "train_step")
    say(Delivery, "_together", "broadcasting", first=True)
    say(observers.RolloutLog, "on_step", "logged")
    say(FileCalls, "__call__", "part written", when=lambda _, task, *__: task in (write_arrays, write_batch))
    say(os, "replace", "sealing", first=True, when=lambda _, target: str(target).endswith("state.json"))
    say(Shelf, "_seal", "sealed")
    say(Storage, "delete", "pruning", when=lambda _, name: name.endswith("state.json"))
    say(driver.Driver, "_export", "exporting", first=True)


# ---- the process that forks drivers ----


def serve() -> None:
    """Forks a driver for every line of stdin, and says its pid and then its exit status; one driver at a time."""
    # What drivers import and build on their way, once for all of them: transformers alone takes three seconds.
    import pyarrow.dataset
    import ray._private.grpc_utils
    import ray.dag  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    from opd_ray import __main__, report  # noqa: F401
    from opd_ray.embedded.prepare import TEACHER_DIR
    from opd_ray.models.weights import check_weights
    from opd_ray.run import driver, train  # noqa: F401

    check_weights("teacher.path", str(TEACHER_DIR), quantised=False)
    pyarrow.array([0])  # at the first one pandas is imported, where it is installed
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_driver(order)
            __main__.main(["train", *order["arguments"]])
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"exit_code": os.waitstatus_to_exitcode(status)}), flush=True)


def _become_driver(order: dict[str, Any]) -> None:
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    if order["fakes"]:
        _put_fakes()
    if order["kill"]:
        _put_points(_Kill(**order["kill"]))


class Driver:
    """A driver that was started."""

    def __init__(self, drivers: Drivers, pid: int, log: Path, start: int) -> None:
        """``start``: size of its log before."""
        self._drivers, self.pid, self._log, self._start = drivers, pid, log, start
        self.exit_code: int | None = None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 240.0) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError."""
        if self.exit_code is None:
            self.exit_code = self._drivers.answer(timeout_s)["exit_code"]
        return self.exit_code

    def wait_until(self, what: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Until something is so, or the driver has ended. Raises TimeoutError."""
        until = time.monotonic() + timeout_s
        while not what():
            if self._drivers.has_answered(0.02):
                return
            if time.monotonic() > until:
                raise TimeoutError(f"it did not come to that within {timeout_s:g} s:\n{self.printed()}")

    def printed(self) -> str:
        """What this driver has printed so far, to stdout and stderr."""
        return self._log.read_bytes()[self._start :].decode(errors="replace")


class Drivers:
    """Starts drivers, one at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import fake_run; fake_run.serve()"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() sees every answer that was not read
        )
        self._running: Driver | None = None

    def __enter__(self) -> Drivers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None and self._running.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._running.signal(signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def start(
        self, arguments: list[str], log: Path, *, kill: dict[str, Any] | None = None, fakes: bool = True
    ) -> Driver:
        """`opd-ray train` with ``arguments``; what it prints is appended to ``log``."""
        if self._running is not None:
            self._running.wait()
        size = log.stat().st_size if log.exists() else 0
        order = {"arguments": arguments, "log": str(log), "kill": kill, "fakes": fakes}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._running = Driver(self, self.answer(120.0)["pid"], log, size)
        return self._running

    def has_answered(self, within_s: float) -> bool:
        """Is there an answer that was not read yet?"""
        return bool(select.select([self._process.stdout], [], [], within_s)[0])

    def answer(self, timeout_s: float) -> dict[str, Any]:
        if not self.has_answered(timeout_s):
            raise TimeoutError(f"the driver gave no sign of its end within {timeout_s:g} s")
        return json.loads(self._process.stdout.readline())
