"""Weight broadcasts between CPU processes, over gloo.

Every group has its own TCPStore and its own ProcessGroupGloo, so it never meets the default
process group that DeepSpeed or vLLM made in the same process. Only gloo and torch are needed:
a learner that uses this module does not import vLLM.

On the wire one broadcast is a header (version and fingerprint of the manifest, so that a
sender and a receiver that were told different things stop instead of mixing weights), then the
buckets of ``plan_buckets``, each one flat byte tensor.
"""

from __future__ import annotations

import math
import socket
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.rooms.threads import within
from opd_ray.weights.manifest import dtype_name

_GRACE_S = 1.0
_ALIGN_BYTES = 16
"""Each parameter starts at a multiple of this, so that its bytes can be viewed as any dtype."""


class GlooGroup:
    """One process's membership in a transfer group; every wait ends by the group's timeout.

    A member for whom a broadcast fails leaves, so that those that wait for it fail at once as well, and not by their
    own timeouts: a member that dies costs the others no time.
    """

    def __init__(self, group: TransferGroup) -> None:
        self.group = group
        with self._explained("join the group"):
            # torch waits without end for a store whose process is stopped; its own timeouts explain more, and so
            # come first.
            self._store, self._process_group = within(group.timeout_s + _GRACE_S, lambda: _join(group))

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """Sends ``tensor`` from rank 0, or fills it on the others; ``what`` names it in errors."""
        with self._explained(f"{'send' if self.group.rank == 0 else 'receive'} {what}"):
            if self._process_group is None:
                raise RuntimeError("an earlier broadcast failed, and this member left the group")
            try:
                self._process_group.broadcast([tensor], dist.BroadcastOptions()).wait()
            except RuntimeError:
                self._store = self._process_group = None
                raise

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            group, cause = self.group, str(error).partition("\n")[0]
            raise WeightSyncError(
                f"weights: rank {group.rank} of {group.world_size} could not {action} within {group.timeout_s:g} s "
                f"(gloo group at {group.host}:{group.port}): {cause}; check that the learner and "
                f"every generator are alive and reach {group.host}:{group.port}, or raise weights.timeout_s"
            ) from error


def _join(group: TransferGroup) -> tuple[dist.TCPStore, dist.ProcessGroupGloo]:
    timeout = timedelta(seconds=group.timeout_s)
    store = dist.TCPStore(group.host, group.port, is_master=group.rank == 0, timeout=timeout, wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()
    # The default device is bound to whatever the host name resolves to, often 127.0.1.1,
    # which other nodes cannot reach; the address that reaches rank 0 always can be.
    address = _address_towards(group.host, group.port)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return store, dist.ProcessGroupGloo(store, group.rank, group.world_size, options)


class GlooTransport:
    """WeightTransport over gloo; CUDA parameters are copied to the host, bucket by bucket."""

    def __init__(self) -> None:
        self._members: GlooGroup | None = None

    def open(self, group: TransferGroup) -> None:
        self.close()
        self._members = GlooGroup(group)

    def send(self, manifest: WeightManifest, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._members is None:
            raise WeightSyncError("weights: send was called before open; open the transfer group first")
        self._members.broadcast(_header(manifest), "the header")
        remaining = iter(parameters)
        for bucket in plan_buckets(manifest, self._members.group.bucket_bytes):
            buffer = torch.empty(bucket[-1].end, dtype=torch.uint8)
            for part in bucket:
                name, tensor = next(remaining, ("nothing", torch.empty(0)))
                _check_agreement(part, name, tensor)
                part.of(buffer).copy_(tensor.detach())
            self._members.broadcast(buffer, _span(bucket))

    def close(self) -> None:
        self._members = None


def receive(members: GlooGroup, manifest: WeightManifest) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The receiving side of one ``GlooTransport.send``: named CPU tensors, one list per bucket.

    Each bucket has its own memory: vLLM keeps the tensors of a layer until the layer is complete.
    """
    header = torch.zeros(2, dtype=torch.int64)
    members.broadcast(header, "the header")
    if not torch.equal(header, _header(manifest)):
        raise WeightSyncError(
            f"weights: rank {members.group.rank} expected version {manifest.version} with "
            f"{len(manifest.names)} parameters, but the sender announced version {int(header[0])} or another "
            "list of parameters; give both sides the same manifest"
        )
    for bucket in plan_buckets(manifest, members.group.bucket_bytes):
        buffer = torch.empty(bucket[-1].end, dtype=torch.uint8)
        members.broadcast(buffer, _span(bucket))
        yield [(part.name, part.of(buffer)) for part in bucket]


class Part:
    """Where one parameter lies in the bytes of its bucket."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], start: int) -> None:
        self.name = name
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.shape = tuple(shape)
        self.start = start
        self.end = start + math.prod(shape) * self.dtype.itemsize

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The parameter as a view of the bucket's bytes."""
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


def plan_buckets(manifest: WeightManifest, bucket_bytes: int) -> list[list[Part]]:
    """Packs parameters in order into buckets of at most ``bucket_bytes``; larger ones travel alone."""
    buckets: list[list[Part]] = []
    for name, dtype, shape in zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True):
        start = -(-buckets[-1][-1].end // _ALIGN_BYTES) * _ALIGN_BYTES if buckets else 0
        part = Part(name, dtype, shape, start)
        if buckets and part.end <= bucket_bytes:
            buckets[-1].append(part)
        else:
            buckets.append([Part(name, dtype, shape, 0)])
    return buckets


def _header(manifest: WeightManifest) -> torch.Tensor:
    layout = repr((manifest.names, manifest.dtypes, [tuple(shape) for shape in manifest.shapes]))
    return torch.tensor([manifest.version, zlib.crc32(layout.encode())])


def _check_agreement(part: Part, name: str, tensor: torch.Tensor) -> None:
    got = (name, tensor.dtype, tuple(tensor.shape))
    if got != (part.name, part.dtype, part.shape):
        raise WeightSyncError(
            f"weights: the manifest announces {part.name} {dtype_name(part.dtype)}{list(part.shape)}, but the learner "
            f"sends {name} {dtype_name(tensor.dtype)}{list(tensor.shape)}; build the manifest from the same parameters"
        )


def _span(bucket: list[Part]) -> str:
    return bucket[0].name if len(bucket) == 1 else f"{bucket[0].name} … {bucket[-1].name}"


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the interface that reaches ``host``; sends no packet."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
