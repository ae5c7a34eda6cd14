"""A member of a gloo group that stops (SIGSTOP) where it is told to, as a process on a frozen machine does.

Run as a script: RANK WORLD_SIZE PORT "hosting" or "receiving". As rank 0 it stops when others can reach it and nobody
has joined yet; as another rank after the first tensor of a broadcast, whose parameters are those of ``weights``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_ray.messages import TransferGroup
from opd_ray.weights.manifest import manifest_of
from opd_ray.weights.transfer import WeightTransfer

SECRET = "5ec2e7"
"""Of its group."""


def weights() -> list[tuple[str, torch.Tensor]]:
    """More than the buffers of sockets hold, each: a member that stops does so in the middle of one."""
    return [(f"parameter{index}", torch.full((4_000_000,), float(index))) for index in range(4)]


@contextmanager
def stopped_member(group: TransferGroup, where: str) -> Iterator[subprocess.Popen]:
    """Starts it as the rank of ``group``, yields when it is about to join, and kills it at the end."""
    arguments = [str(value) for value in (group.rank, group.world_size, group.port, where)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until_stopped(process: subprocess.Popen) -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "it ended instead"


def _main(rank: int, world_size: int, port: int, where: str) -> None:
    print("ready", flush=True)
    if where == "hosting":
        _taking_connections = socket.create_server(("127.0.0.1", port))
    else:
        receiver = WeightTransfer()
        receiver.connect(TransferGroup("gloo", "127.0.0.1", port, rank, world_size, 60.0, 4_000_000, SECRET))
        next(iter(receiver.receive(manifest_of(weights(), 1))))
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:4]), sys.argv[4])
