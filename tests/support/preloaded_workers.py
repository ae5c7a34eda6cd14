"""Processes that have imported torch, transformers and vLLM before they start: forks of one process that did it once.

    with preloaded() as executable:
        ray.init("local", runtime_env={"py_executable": executable})
        subprocess.Popen([*executable.split(), "script.py", "argument"])

A worker of its own takes four seconds of CPU to import what a learner needs and nine for what vLLM needs, which no test
is about. The server is told of every process by a client (forked_worker.py), which whoever started it takes for the
process itself: it ends when the process does, and the process is killed when it goes. All that run tests side by side
share one server; it ends with the last of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    *("deepspeed", "transformers.models.qwen3.modeling_qwen3", "transformers.generation"),
    *("opd_ray.learn.objective", "opd_ray.score.torch"),
    *("jsonschema", "pyarrow.parquet", "rich.progress"),  # of ray and of what needs it
)
VLLM_MODULES = (
    *("vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3"),
    *("vllm.v1.core.sched.scheduler", "vllm.v1.attention.backends.cpu_attn", "vllm.renderers.hf"),
    "vllm.entrypoints.launchers.api_server.entry",
)
"""All without ray, which reads the id of its job from the environment when it is imported: each worker does that for
itself. What vLLM reads in the environment it reads when it is asked, but for its level of logging, and whether its
functions are compiled."""
_SETTINGS = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
_ORDER_S = 60.0
"""Within which a client says what it wants; it does so at once."""
NO_ORDER = bytes(4)
"""From a client that wants no process, but that the server goes on while it is connected."""


@contextlib.contextmanager
def preloaded() -> Iterator[str]:
    """Gives the command of a Python that has MODULES before it runs its script."""
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    directory = Path(tempfile.gettempdir()) / f"opd-{shared[:12]}"
    address = directory / "workers"
    with socket.socket(socket.AF_UNIX) as stays, socket.socket(socket.AF_UNIX) as again:
        with _locked(directory):
            if not _stay(stays, address):
                _start(address)
                assert _stay(again, address), "the process that preloads workers did not stay"
        client = Path(__file__).with_name("forked_worker.py")
        yield f"{sys.executable} -SE {client} {address}"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """For one of those that run tests side by side at a time."""
    directory.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _stay(connection: socket.socket, address: Path) -> bool:
    """Whether there is a server; it goes on while the connection is open."""
    try:
        connection.connect(str(address))
        connection.sendall(NO_ORDER)
        return bool(connection.recv(1))
    except OSError:
        return False


def _start(address: Path) -> None:
    address.unlink(missing_ok=True)
    address.parent.mkdir(mode=0o700, exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=os.environ | _SETTINGS,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with server.stdout:
        assert b"ready\n" in server.stdout, "the process that preloads workers did not come up"
    server.wait(timeout=_ORDER_S)


def _serve(address: str) -> None:
    """Forks a worker for every client that connects, until the last of those is gone that want it to go on."""
    for module in MODULES:
        importlib.import_module(module)
    if importlib.util.find_spec("vllm"):
        sys.modules["ray"] = None  # vLLM does without where it is not installed
        for module in VLLM_MODULES:
            importlib.import_module(module)
        del sys.modules["ray"]
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()  # forks share what is never looked at again
    threads = [
        (Path("/proc/self/task") / number / "comm").read_text().strip() for number in os.listdir("/proc/self/task")
    ]
    others = threads.count("jemalloc_bg_thd")  # pyarrow's allocator, which knows of forks
    assert len(threads) == 1 + others, f"a process with the threads {threads} cannot be forked"
    clients: dict[int, socket.socket] = {}
    """By the file descriptor of the worker's process."""
    pids: dict[int, int] = {}
    staying: set[socket.socket] = set()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as waiting:
        listener.bind(address)
        listener.listen(64)
        waiting.register(listener, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listener:
                    client = listener.accept()[0]
                    try:
                        pid = _fork(client, [listener, waiting, *clients.values(), *staying])
                    except (OSError, ValueError):  # it died before it had said what it wants
                        client.close()
                        continue
                    if not pid:
                        staying.add(client)
                        waiting.register(client, selectors.EVENT_READ)
                        client.sendall(b"+")
                        continue
                    worker = os.pidfd_open(pid)
                    clients[worker], pids[worker] = client, pid
                    waiting.register(worker, selectors.EVENT_READ)
                    waiting.register(client, selectors.EVENT_READ, worker)
                elif key.fd in clients:  # a worker has ended
                    client, _ = clients.pop(key.fd), pids.pop(key.fd)
                    os.waitid(os.P_PIDFD, key.fd, os.WEXITED)
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    if client in waiting.get_map():
                        waiting.unregister(client)
                    client.close()
                elif key.data in clients:  # the worker's client is gone
                    waiting.unregister(key.fileobj)
                    _kill(pids[key.data])
                elif key.fileobj in staying:
                    waiting.unregister(key.fileobj)
                    staying.remove(key.fileobj)
                    key.fileobj.close()
                    if not staying:
                        for worker in clients:
                            _kill(pids[worker])
                        shutil.rmtree(Path(address).parent)
                        return


def _kill(worker: int) -> None:
    """With what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        os.killpg(worker, signal.SIGKILL)


def _fork(client: socket.socket, not_the_workers: Sequence[Any]) -> int:
    """The pid of a new worker, which does what its client was started for; 0 for a client that wants none."""
    client.settimeout(_ORDER_S)
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    if size == NO_ORDER:
        return 0
    with client.makefile("rb") as message:
        order = json.loads(message.read(int.from_bytes(size, "big")))
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        return pid
    try:
        os.setpgid(0, 0)  # as Ray does: it kills the group of a worker that has ended
        for each in (client, *not_the_workers):
            each.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["directory"])
        sys.argv = order["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    if os.fork() == 0:  # nobody's child: what a test looks for among its own must not be what others had forked
        _serve(sys.argv[1])
