"""What a broadcast's bytes travel by. A wire joins its group when it is made, and every wait on it ends by the group's
timeout; after one that failed it is of no more use.

    device                the device that tensors must be on
    broadcast(tensor)     sends it from rank 0, fills it on the others; raises RuntimeError or OSError
    close()               leaves the group

Each has a group of its own and never meets the default process group that DeepSpeed or vLLM made in the same process.
"""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from opd_ray.messages import TransferGroup
from opd_ray.rooms.node import use_own_interface
from opd_ray.rooms.threads import within

_GRACE_S = 1.0


class Wire(Protocol):
    """See the module."""

    device: torch.device

    def broadcast(self, tensor: torch.Tensor) -> None: ...

    def close(self) -> None: ...


def join(group: TransferGroup) -> Wire:
    """Blocks until all members joined, or the timeout."""
    device = torch.accelerator.current_device_index() if torch.cuda.is_available() else None
    wire = {"gloo": GlooWire, "nccl": NcclWire}[group.backend]

    def on_device() -> Wire:
        with torch.accelerator.device_index(device):
            return wire(group)

    # torch waits without end for a store whose process is stopped, and NCCL for a member that does not come; torch's
    # own timeouts explain more, and so come first.
    return within(group.timeout_s + _GRACE_S, on_device)


class GlooWire:
    """Between CPU processes, over TCP. Needs torch only: a learner that uses it does not import vLLM."""

    device = torch.device("cpu")

    def __init__(self, group: TransferGroup) -> None:
        timeout = timedelta(seconds=group.timeout_s)
        self._store = dist.TCPStore(
            group.host, group.port, is_master=group.rank == 0, timeout=timeout, wait_for_workers=False
        )
        options = dist.ProcessGroupGloo._Options()
        # The default device is bound to whatever the host name resolves to, often 127.0.1.1,
        # which other nodes cannot reach; the address that reaches rank 0 always can be.
        address = _address_towards(group.host, group.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        self._process_group = dist.ProcessGroupGloo(self._store, group.rank, group.world_size, options)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._process_group.broadcast([tensor], dist.BroadcastOptions()).wait()

    def close(self) -> None:
        """Those that wait for this member fail at once, and not by their own timeouts."""
        del self._store, self._process_group


class NcclWire:
    """Between GPUs, over vLLM's communicator on the current device.

    Waits inside NCCL have no timeout of their own: here they end by an abort of the communicator. That was checked
    with a stand-in for the communicator only, and not yet run on GPUs.
    """

    def __init__(self, group: TransferGroup) -> None:
        from vllm.distributed.weight_transfer import nccl_common

        use_own_interface()
        where = {"master_address": group.host, "master_port": group.port, "world_size": group.world_size}
        self._communicator = nccl_common.trainer_init(where, rank=group.rank)
        if self._communicator.disabled:  # its broadcasts would return at once, without an error
            raise RuntimeError("vLLM found no NCCL library")
        self._timeout_s = group.timeout_s
        self.device: torch.device = self._communicator.device

    def broadcast(self, tensor: torch.Tensor) -> None:
        # Named outright: vLLM would move the thread to a stream of its own, and a rank that gathers on another
        # stream than the others deadlocks under ZeRO-3.
        stream = torch.cuda.current_stream(self.device)
        timer = threading.Timer(self._timeout_s, self._abort)
        timer.daemon = True
        timer.start()
        try:
            self._communicator.broadcast(tensor, src=0, stream=stream)
            stream.synchronize()
        finally:
            timer.cancel()
            if self._communicator.disabled:  # an aborted kernel ends without an error, with anything in the tensor
                raise TimeoutError("it was aborted")

    def close(self) -> None:
        self._communicator.destroy()

    def _abort(self) -> None:
        self._communicator.disabled = True  # further calls, that of destroy() as well, return at once
        with torch.accelerator.device_index(self.device.index):
            self._communicator.nccl.ncclCommAbort(self._communicator.comm)


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the interface that reaches ``host``; sends no packet."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
