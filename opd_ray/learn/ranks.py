"""The ranks of a learner: how they meet, and what they tell each other beside DeepSpeed's collectives."""

from __future__ import annotations

import hashlib
import json
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from opd_ray.weights.meeting import prove


def join(backend: str, rank: int, num_ranks: int, address: tuple[str, int], secret: str, timeout: timedelta) -> None:
    """Makes the default process group, which DeepSpeed then takes; blocks for all ranks. Raises PermissionError where
    whoever is connected as one of them does not know the secret.

    Left to itself torch listens for the ranks at every address of the machine, and takes whoever comes.
    """
    store = dist.HashStore() if num_ranks == 1 else _store(rank, num_ranks, address, secret, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    if num_ranks > 1:
        prove(secret, rank, num_ranks, _exchange)


def everyones(value: Any) -> list[Any]:
    """Each rank's ``value``, on every rank; as JSON, where there are others: torch's own way is a pickle."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if num_ranks == 1:
        return [value]
    ours = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    sizes = list(torch.zeros(num_ranks, 1, dtype=torch.int64, device=ours.device))
    dist.all_gather(sizes, torch.tensor([len(ours)], device=ours.device))
    padded = torch.nn.functional.pad(ours, (0, int(max(sizes)) - len(ours)))
    theirs = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(theirs, padded)
    return [json.loads(bytes(each[: int(size)].tolist())) for each, size in zip(theirs, sizes, strict=True)]


def _store(rank: int, num_ranks: int, address: tuple[str, int], secret: str, timeout: timedelta) -> dist.Store:
    """At rank 0's address, under a prefix of the group's own: a rank of another group finds nothing there. A stranger
    can list it; ``prove`` is what keeps strangers out. It stays open, for groups that DeepSpeed and NCCL make later."""
    descriptor = None
    if rank == 0:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        descriptor = socket.create_server(address, family=family).detach()
    store = dist.TCPStore(*address, num_ranks, rank == 0, timeout=timeout, master_listen_fd=descriptor)
    return dist.PrefixStore(hashlib.sha256(f"store {secret}".encode()).hexdigest(), store)


def _exchange(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.to(_device())
    got = torch.empty_like(rows)
    dist.all_to_all_single(got, rows)
    return got.cpu()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
