"""One process's part in weight broadcasts, whatever they travel by.

On the wire one broadcast is a header (version and fingerprint of the manifest, so that a sender and a receiver that
were told different things stop instead of mixing weights), then the buckets of ``plan_buckets``, each one flat byte
tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.models.checkpoints import read_weights
from opd_ray.weights.adapters import merged
from opd_ray.weights.manifest import dtype_name
from opd_ray.weights.wires import Wire, join

_ALIGN_BYTES = 16
"""Each parameter starts at a multiple of this, so that its bytes can be viewed as any dtype."""


class WeightTransfer:
    """Membership in one transfer group at a time: rank 0 sends, the others receive. Every wait ends by the group's
    timeout, and every failure is a WeightSyncError.

    A member for whom a broadcast fails leaves, so that those that wait for it over gloo fail at once as well: a member
    that dies costs the others no time. It must connect to another group then.
    """

    def __init__(self) -> None:
        self._group: TransferGroup | None = None
        self._wire: Wire | None = None

    def connect(self, group: TransferGroup) -> None:
        """Joins the group, after leaving the former one; blocks until all members joined."""
        self.close()
        self._group = group
        with self._explained("join the group"):
            self._wire = join(group)

    def send(self, manifest: WeightManifest, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcasts every parameter, in the manifest's order; tied ones may come under each of their names."""
        device = self._connected("send").device
        self._broadcast(_header(manifest).to(device), "the header")
        tied = {other for other, _ in manifest.tied}
        remaining = ((name, tensor) for name, tensor in parameters if name not in tied)
        for bucket in plan_buckets(manifest, self._group.bucket_bytes):
            buffer = torch.empty(bucket[-1].end, dtype=torch.uint8, device=device)
            for part in bucket:
                name, tensor = next(remaining, ("nothing", torch.empty(0)))
                _check_agreement(part, name, tensor)
                part.of(buffer).copy_(tensor.detach())
            self._broadcast(buffer, _span(bucket))

    def receive(self, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors of one ``send``, in order, on the wire's device; tied ones again, under their other names,
        at the end.

        Each bucket has its own memory: vLLM keeps the tensors of a layer until the layer is complete.
        """
        device = self._connected("receive").device
        header = torch.zeros(2, dtype=torch.int64, device=device)
        self._broadcast(header, "the header")
        if not torch.equal(header.cpu(), _header(manifest)):
            raise WeightSyncError(
                f"weights: rank {self._group.rank} expected version {manifest.version} with "
                f"{len(manifest.names)} parameters, but the sender announced version {int(header[0])} or another "
                "list of parameters; give both sides the same manifest"
            )
        others, shared = {name for _, name in manifest.tied}, {}
        for bucket in plan_buckets(manifest, self._group.bucket_bytes):
            buffer = torch.empty(bucket[-1].end, dtype=torch.uint8, device=device)
            self._broadcast(buffer, _span(bucket))
            for part in bucket:
                if part.name in others:
                    shared[part.name] = part.of(buffer)
                yield part.name, part.of(buffer)
        yield from ((other, shared[name]) for other, name in manifest.tied)

    def receive_whole(self, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's weights after one ``send``: as they come, or those of its base with the adapters that come."""
        received = self.receive(manifest)
        if manifest.base is None:
            return received
        return merged(read_weights(manifest.base), dict(received), manifest.scale)

    def close(self) -> None:
        """Leaves the group. Closing twice is allowed."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def _connected(self, action: str) -> Wire:
        if self._wire is None:
            raise WeightSyncError(
                f"weights: {action} was called before connect, or after a broadcast that failed; "
                "connect to a transfer group first"
            )
        return self._wire

    def _broadcast(self, tensor: torch.Tensor, what: str) -> None:
        with self._explained(f"{'send' if self._group.rank == 0 else 'receive'} {what}"):
            self._wire.broadcast(tensor)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            self.close()
            group, cause = self._group, str(error).partition("\n")[0]
            raise WeightSyncError(
                f"weights: rank {group.rank} of {group.world_size} could not {action} within {group.timeout_s:g} s "
                f"({group.backend} group at {group.host}:{group.port}): {cause}; check that the learner and "
                f"every generator are alive and reach {group.host}:{group.port}, or raise weights.timeout_s"
            ) from error


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
    # Lists: whoever was told by vLLM's own messages may have those where others have tuples.
    nested = ([list(each) for each in column] for column in (manifest.shapes, manifest.tied))
    layout = repr([list(manifest.names), list(manifest.dtypes), *nested, manifest.base, manifest.scale])
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
