"""What a broadcast's bytes travel by. A wire joins its group when it is made, and every wait on it ends by the group's
timeout; after one that failed it is of no more use.

    device          the device that tensors must be on
    start(tensor)   begins to send it from rank 0, or to fill it on the others; one or two are under way
    finish()        waits for the one that was started first
    settle()        waits until no member has anything under way; who leaves earlier ends it for the others. All three
                    raise RuntimeError or OSError
    close()         leaves the group

Each has a group of its own and never meets the default process group that DeepSpeed or vLLM made in the same process.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from opd_ray.messages import TransferGroup
from opd_ray.rooms import threads
from opd_ray.rooms.node import use_own_interface
from opd_ray.weights.meeting import meet, prove

_GRACE_S = 1.0
_LOOK_S = 0.5
"""How long a tensor travels before its members are looked at."""
_NEVER_SENT = 2**20
"""A tag."""


class Wire(Protocol):
    """See the module."""

    device: torch.device

    def start(self, tensor: torch.Tensor) -> None: ...

    def finish(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...


def join(group: TransferGroup) -> Wire:
    """Blocks until all members joined, or the timeout."""
    device = torch.accelerator.current_device_index() if torch.cuda.is_available() else None
    wire = {"gloo": GlooWire, "nccl": NcclWire}[group.backend]

    def on_device() -> Wire:
        with torch.accelerator.device_index(device):
            return wire(group)

    # NCCL waits without end for a member that does not come; the timeouts of the meeting and of gloo explain more, and
    # so come first.
    return threads.within(group.timeout_s + _GRACE_S, on_device)


class GlooWire:
    """Between CPU processes, over TCP. Needs torch only: a learner that uses it does not import vLLM."""

    device = torch.device("cpu")

    def __init__(self, group: TransferGroup) -> None:
        options = dist.ProcessGroupGloo._Options()
        # The default device is bound to whatever the host name resolves to, often 127.0.1.1,
        # which other nodes cannot reach; the address that reaches rank 0 always can be.
        address = _address_towards(group.host, group.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=group.timeout_s)
        self._process_group = dist.ProcessGroupGloo(_Addresses(group), group.rank, group.world_size, options)
        self._under_way: deque[dist.Work] = deque()
        # Gloo lets in whoever comes to a member's port with the number of a connection, which is easily guessed.
        prove(group.secret, group.rank, group.world_size, self._exchange)

    def _exchange(self, rows: torch.Tensor) -> torch.Tensor:
        got = torch.empty_like(rows)
        self._process_group.alltoall_base(got, rows, [], [], dist.AllToAllOptions()).wait()
        return got

    def start(self, tensor: torch.Tensor) -> None:
        self._under_way.append(self._process_group.broadcast([tensor], dist.BroadcastOptions()))

    def finish(self) -> None:
        work = self._under_way[0]
        # Gloo tells nobody of a connection that ended in the middle of a tensor: who waits for it waits by its timeout.
        while not _ended(work, _LOOK_S):
            if self._has_left(timeout=None) and not _ended(work, _GRACE_S):
                raise ConnectionError("a member left in the middle of it")
        self._under_way.popleft().wait()

    def settle(self) -> None:
        self._under_way.append(self._process_group.barrier(dist.BarrierOptions()))
        self.finish()

    def close(self) -> None:
        """Those that wait for this member fail at once, and not by their own timeouts; what is under way neither reads
        nor writes its tensor any more."""
        if self._under_way:
            self._has_left(timeout=timedelta(milliseconds=1))
            # The group's end waits for what it does, holding the GIL.
            threads.start(_outlast, self._process_group, self._under_way)
        del self._process_group

    def _has_left(self, timeout: timedelta | None) -> bool:
        """Is the connection to a member closed? With a timeout, all are afterwards: gloo closes those of a group in
        which something took longer than it might."""
        left, nothing = False, torch.empty(1, dtype=torch.uint8)
        for rank in range(self._process_group.size()):
            if rank != self._process_group.rank():
                try:
                    never = self._process_group.recv([nothing], rank, _NEVER_SENT)
                    if timeout is not None:
                        never.wait(timeout)
                except RuntimeError:
                    left = True
        return left


def _ended(work: dist.Work, timeout_s: float) -> bool:
    with contextlib.suppress(RuntimeError):
        work.wait(timedelta(seconds=timeout_s))
    return work.is_completed()


def _outlast(process_group: dist.ProcessGroupGloo, under_way: deque[dist.Work]) -> None:
    """Keeps a group until nothing of it is under way."""
    for work in under_way:
        with contextlib.suppress(RuntimeError):
            work.wait()


class _Addresses(dist.Store):
    """What gloo takes for a store: each member sets where it listens, and then asks where the others do."""

    def __init__(self, group: TransferGroup) -> None:
        super().__init__()
        self._group, self._ours, self._all = group, {}, {}

    def set(self, key: str, value: bytes) -> None:
        self._ours[key] = value

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        if not self._all:
            self._all = meet(self._group, self._ours)
        if unknown := [key for key in keys if key not in self._all]:
            raise RuntimeError(f"gloo asks for {unknown[0]}, which no member told the others")

    def get(self, key: str) -> bytes:
        return self._all[key]


class NcclWire:
    """Between GPUs, over vLLM's communicator on the current device.

    Waits inside NCCL have no timeout of their own: here they end by an abort of the communicator. That was checked
    with a stand-in for the communicator only, and not yet run on GPUs.
    """

    def __init__(self, group: TransferGroup) -> None:
        from vllm.distributed.weight_transfer import nccl_common

        use_own_interface()
        # Whoever has NCCL's id of the group can join it. vLLM's own rendezvous tells it to everyone who asks, pickled.
        facts = {"nccl": _new_nccl_id()} if group.rank == 0 else {}
        self._communicator = nccl_common.uid_init_process_group(
            meet(group, facts)["nccl"], group.rank, group.world_size, torch.accelerator.current_device_index()
        )
        if self._communicator.disabled:  # its broadcasts would return at once, without an error
            raise RuntimeError("vLLM found no NCCL library")
        self._timeout_s = group.timeout_s
        self.device: torch.device = self._communicator.device

    def start(self, tensor: torch.Tensor) -> None:
        """Waits for it here: what hides behind it on GPUs, a copy within one, takes no time."""
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

    def finish(self) -> None:
        pass

    def settle(self) -> None:
        """Nobody here notices that another one left."""

    def close(self) -> None:
        self._communicator.destroy()

    def _abort(self) -> None:
        self._communicator.disabled = True  # further calls, that of destroy() as well, return at once
        with torch.accelerator.device_index(self.device.index):
            self._communicator.nccl.ncclCommAbort(self._communicator.comm)


def _new_nccl_id() -> bytes:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():
        return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the interface that reaches ``host``; sends no packet."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
