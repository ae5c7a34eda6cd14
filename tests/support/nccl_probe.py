"""Broadcasts over the NCCL wire with stand-ins for vLLM's communicators.

Lives in the vLLM host process: the communicators are made by the installed vLLM's own rendezvous, up to the point where
it would need GPUs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch
from vllm.distributed.weight_transfer import nccl_common

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup
from opd_ray.weights import wires
from opd_ray.weights.manifest import manifest_of
from opd_ray.weights.transfer import WeightTransfer

WEIGHTS = [("matrix", torch.randn(7, 5)), ("half", torch.randn(3).to(torch.bfloat16)), ("large", torch.randn(300))]

NCCL_ID = bytes(range(128))


class Communicator:
    """Takes tensors from rank 0 to the others of this process; or, ``stuck``, waits for an abort."""

    device = torch.device("cpu")

    def __init__(self, rank: int, lines: Sequence[queue.Queue[torch.Tensor]], stuck: bool = False) -> None:
        self.disabled, self.nccl, self.comm = False, self, None
        self._rank, self._lines, self._stuck = rank, lines, stuck
        self._aborted = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object) -> None:
        if self._stuck:
            assert self._aborted.wait(60) and self.disabled
        elif self._rank == src:
            for line in self._lines[1:]:
                line.put(tensor.clone())
        else:
            tensor.copy_(self._lines[self._rank].get(timeout=60))

    def ncclCommAbort(self, comm: object) -> None:  # noqa: N802
        self._aborted.set()

    def destroy(self) -> None:
        self.disabled = True


class NcclProbe:
    def broadcast(self, groups: Sequence[TransferGroup], rounds: int) -> list[bool]:
        """Did each receiver get the weights bit for bit, round by round?"""
        lines: list[queue.Queue[torch.Tensor]] = [queue.Queue() for _ in groups]
        with _made_by(lambda rank: Communicator(rank, lines)), ThreadPoolExecutor() as threads:
            sender, *receivers = [WeightTransfer() for _ in groups]
            list(threads.map(WeightTransfer.connect, [sender, *receivers], groups))
            got = []
            for version in range(rounds):
                manifest = manifest_of(WEIGHTS, version)
                takes = [threads.submit(lambda r=each, m=manifest: list(r.receive(m))) for each in receivers]
                sender.send(manifest, WEIGHTS)
                got += [_same(take.result()) for take in takes]
        return got

    def send_to_a_stopped_member(self, group: TransferGroup) -> tuple[float, list[str]]:
        """Seconds that a broadcast took which only an abort ends, and the errors of it and of the next one."""
        errors = []
        with _made_by(lambda rank: Communicator(rank, [], stuck=True)), _the_others_came():
            transfer = WeightTransfer()
            transfer.connect(group)
            start = time.monotonic()
            for version in range(2):
                try:
                    transfer.send(manifest_of(WEIGHTS, version), WEIGHTS)
                except WeightSyncError as error:
                    errors.append(str(error))
        return time.monotonic() - start, errors

    def join_without_the_others(self, group: TransferGroup) -> str:
        """The error of a rendezvous that never ends by itself."""
        forever = threading.Event()
        with _made_by(lambda rank: forever.wait()), _the_others_came():
            try:
                WeightTransfer().connect(group)
            except WeightSyncError as error:
                return str(error)
        return "it ended without an error"


def _same(received: list[tuple[str, torch.Tensor]]) -> bool:
    pairs = zip(received, WEIGHTS, strict=True)
    return all(got == name and torch.equal(tensor, sent) for (got, tensor), (name, sent) in pairs)


def _the_others_came() -> object:
    return mock.patch.object(wires, "meet", return_value={"nccl": NCCL_ID})


@contextmanager
def _made_by(make: object) -> Iterator[None]:
    def initialised(nccl_id: bytes, rank: int, world_size: int, device: int) -> object:
        assert nccl_id == NCCL_ID, "rank 0's, whoever asks"
        return make(rank)

    with (
        mock.patch.object(wires, "_new_nccl_id", return_value=NCCL_ID),
        mock.patch.object(nccl_common, "uid_init_process_group", initialised),
        mock.patch.object(torch.accelerator, "current_device_index", return_value=0),
        mock.patch.object(torch.cuda, "current_stream"),
    ):
        yield
