"""Processes of no run that reach a group's port, and what they try."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def join_by_torch(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> torch.Tensor:
    """The first tensor that rank 0 broadcasts, to one who knows torch, the port, and no secret: how a stranger got the
    weights while rank 0's store told everybody where gloo's members listen. Raises RuntimeError."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    group = dist.ProcessGroupGloo(store, rank, world_size, options)
    header = torch.zeros(2, dtype=torch.int64)
    group.broadcast([header], dist.BroadcastOptions()).wait()
    return header
