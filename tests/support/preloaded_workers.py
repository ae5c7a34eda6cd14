"""Workers of Ray that have imported torch and transformers before they start: forks of one process that did it once.

    with preloaded() as executable:
        ray.init("local", runtime_env={"py_executable": executable})

A worker of its own takes four seconds of CPU to import what a learner needs, which no test is about. The server is told
of every worker by a client (forked_worker.py), which Ray takes for the worker's process: it ends when the worker does,
and the worker is killed when it goes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import selectors
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
)
"""Without ray, which reads the id of its job from the environment when it is imported, and without vLLM, which reads
settings there: each worker imports these for itself."""
_ORDER_S = 60.0
"""Within which a client says what it wants; it does so at once."""


@contextlib.contextmanager
def preloaded() -> Iterator[str]:
    """Gives the ``py_executable`` of workers that have MODULES; they end with the block."""
    with tempfile.TemporaryDirectory(prefix="opd-") as directory:
        address = Path(directory) / "workers"
        server = subprocess.Popen(
            [sys.executable, __file__, str(address)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert b"ready\n" in server.stdout, "the process that preloads workers did not come up"
            client = Path(__file__).with_name("forked_worker.py")
            yield f"{sys.executable} -SE {client} {address}"
        finally:
            server.stdin.close()  # its sign to end
            server.wait(timeout=60)
            server.stdout.close()


def _serve(address: str) -> None:
    """Forks a worker for every client that connects, until stdin ends."""
    for module in MODULES:
        importlib.import_module(module)
    assert "ray" not in sys.modules
    threads = [
        (Path("/proc/self/task") / number / "comm").read_text().strip() for number in os.listdir("/proc/self/task")
    ]
    others = threads.count("jemalloc_bg_thd")  # pyarrow's allocator, which knows of forks
    assert len(threads) == 1 + others, f"a process with the threads {threads} cannot be forked"
    clients: dict[int, socket.socket] = {}
    """By the file descriptor of the worker's process."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as waiting:
        listener.bind(address)
        listener.listen(64)
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listener:
                    client = listener.accept()[0]
                    worker = _fork(client, [listener, waiting, *clients.values()])
                    clients[worker] = client
                    waiting.register(worker, selectors.EVENT_READ)
                    waiting.register(client, selectors.EVENT_READ, worker)
                elif key.fd in clients:  # a worker has ended
                    client = clients.pop(key.fd)
                    os.waitid(os.P_PIDFD, key.fd, os.WEXITED)
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    if client in waiting.get_map():
                        waiting.unregister(client)
                    client.close()
                elif key.data in clients:  # the worker's client is gone
                    waiting.unregister(key.fileobj)
                    signal.pidfd_send_signal(key.data, signal.SIGKILL)
                elif key.fileobj is sys.stdin:
                    for worker in clients:
                        signal.pidfd_send_signal(worker, signal.SIGKILL)
                    return


def _fork(client: socket.socket, not_the_workers: Sequence[Any]) -> int:
    """The pidfd of a new worker, which does what its client was started for."""
    client.settimeout(_ORDER_S)
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as message:
        order = json.loads(message.read(int.from_bytes(size, "big")))
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        return os.pidfd_open(pid)
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
    _serve(sys.argv[1])
