"""A process that holds engines, so that vLLM does not spoil the one that pytest runs in.

vLLM binds memory, disables ``torch.set_num_threads`` and initialises the default process group. The parent calls the
engines over a pipe; run as a script, this file is the child, which has imported vLLM before (preloaded_workers.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import psutil
import pytest


class EngineHost:
    """Starts the child at the first ``build``; calls are answered one at a time, but for those that an engine answers
    beside its steps, which have a pipe and a thread of their own. ``python``: the command it runs by."""

    def __init__(self, python: str) -> None:
        self._python = python.split()
        self._process: subprocess.Popen | None = None
        self._pipes: list[Connection] = []
        """For ordinary calls, and for those beside them."""
        self._locks = threading.Lock(), threading.Lock()

    def build(self, target: str, **kwargs: Any) -> HostedEngine:
        """An object made from "module:Class" in the child; it lives until the host is closed."""
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vLLM is not installed (the extras cpu and gpu bring it)")
        if self._process is None:
            self._start()
        return HostedEngine(self, self.ask(("build", target, kwargs)))

    def ask(self, message: tuple, beside: bool = False) -> Any:
        with self._locks[beside]:
            self._pipes[beside].send(message)
            outcome, value = self._pipes[beside].recv()
        if outcome == "error":
            raise value
        return value

    def memory_bytes(self) -> int:
        """What the child has to itself."""
        return psutil.Process(self.ask(("pid",))).memory_full_info().uss

    def close(self) -> None:
        if self._process is not None:
            for pipe in self._pipes:
                pipe.close()
            self._process.wait(timeout=30)

    def _start(self) -> None:
        from opd_ray.rooms.memory import KERNEL_CACHES  # here: the child does not need what comes along

        with Listener() as listener:
            # As a run's actors have it.
            environment = os.environ | KERNEL_CACHES | {"OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            command = [*self._python, __file__, str(listener.address)]
            self._process = subprocess.Popen(command, env=environment)
            self._pipes = [listener.accept(), listener.accept()]


class HostedEngine:
    """An engine in the child; methods and ``weight_version`` as on the engine itself."""

    def __init__(self, host: EngineHost, key: int) -> None:
        self._host = host
        self._key = key

    @property
    def weight_version(self) -> int:
        return self._host.ask(("get", self._key, "weight_version"))

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._host.ask(("call", self._key, name, args), beside=name == "receive")


def _main(address: str) -> None:
    engines: list[Any] = []
    with Client(address) as pipe, Client(address) as beside:
        threading.Thread(target=_serve, args=(beside, engines), daemon=True).start()
        _serve(pipe, engines)


def _serve(pipe: Connection, engines: list[Any]) -> None:
    while True:
        try:
            verb, *rest = pipe.recv()
        except EOFError:
            os._exit(0)  # vLLM's own exit takes many seconds and frees nothing that the kernel does not
        try:
            pipe.send(("value", _answer(engines, verb, rest)))
        except Exception as error:
            pipe.send(("error", error))


def _answer(engines: list[Any], verb: str, rest: list[Any]) -> Any:
    if verb == "build":
        target, kwargs = rest
        module, _, name = target.partition(":")
        engines.append(getattr(importlib.import_module(module), name)(**kwargs))
        return len(engines) - 1
    if verb == "pid":
        return os.getpid()
    if verb == "get":
        key, name = rest
        return getattr(engines[key], name)
    key, name, args = rest
    return getattr(engines[key], name)(*args)


if __name__ == "__main__":
    _main(sys.argv[1])
