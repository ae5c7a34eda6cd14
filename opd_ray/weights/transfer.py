"""One process's part in weight broadcasts, whatever they travel by.

On the wire one broadcast is a header (version and fingerprint of the manifest, so that a sender and a receiver that
were told different things stop instead of mixing weights), then the buckets of ``plan_buckets``, each one flat byte
tensor. Two of them are under way at a time: while one travels, the next is copied together.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TypeVar

import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.models.checkpoints import read_weights
from opd_ray.weights.adapters import merged
from opd_ray.weights.beside import Memory, new_bytes
from opd_ray.weights.manifest import dtype_name
from opd_ray.weights.wires import Wire, join

_ALIGN_BYTES = 64
"""Each parameter starts at a multiple of this, as torch's own tensors do: an engine may compute with it where it is."""
_AT_ONCE = 2
"""Tensors under way."""
_T = TypeVar("_T")


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
        """Broadcasts every parameter, in the manifest's order; tied ones may come under each of their names. Returns
        when every receiver is through."""
        self._connected("send")
        self._header(manifest)
        tied = {other for other, _ in manifest.tied}
        for _ in self._in_turn(self._outgoing(manifest, (each for each in parameters if each[0] not in tied))):
            pass
        self._settle()

    def receive(self, manifest: WeightManifest, memory: Memory | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors of one ``send``, in order, on the wire's device; tied ones again, under their other names,
        at the end.

        They lie in ``memory``, where the next broadcast into it overwrites them; without, each bucket has its own: vLLM
        keeps the tensors of a layer until the layer is complete.
        """
        self._connected("receive")
        announced, expected = self._header(manifest)
        if announced != expected:
            raise WeightSyncError(
                f"weights: rank {self._group.rank} expected version {manifest.version} with "
                f"{len(manifest.names)} parameters, but the sender announced version {announced[0]} or another "
                "list of parameters; give both sides the same manifest"
            )
        others, shared = {name for _, name in manifest.tied}, {}
        for bucket, buffer in self._in_turn(self._incoming(manifest, memory)):
            for part in bucket:
                if part.name in others:
                    shared[part.name] = part.of(buffer)
                yield part.name, part.of(buffer)
        self._settle()
        yield from ((other, shared[name]) for other, name in manifest.tied)

    def receive_whole(
        self, manifest: WeightManifest, memory: Memory | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's weights after one ``send``: as they come, or those of its base with the adapters that come."""
        received = self.receive(manifest, memory)
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

    def _header(self, manifest: WeightManifest) -> tuple[list[int], list[int]]:
        """What rank 0 announces, and what it would for this manifest."""
        expected = _header(manifest)
        header = expected.to(self._wire.device, copy=True)
        for _ in self._in_turn([(header, "the header", None)]):
            pass
        return header.tolist(), expected.tolist()

    def _outgoing(
        self, manifest: WeightManifest, parameters: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, str, None] | None]:
        """The bytes of every bucket, copied together when they are asked for."""
        most, buckets = self._group.bucket_bytes, plan_buckets(manifest, self._group.bucket_bytes)
        packed = max((bucket[-1].end for bucket in buckets if bucket[-1].end <= most), default=0)
        # Memory that is written to for the first time costs more than the copy: the same buffers take turns.
        turns = cycle([new_bytes(packed, self._wire.device) for _ in range(_AT_ONCE)])
        for bucket in buckets:
            if bucket[-1].end > most:
                whole = _agreed(bucket[0], parameters).to(self._wire.device).contiguous()
                yield whole.view(-1).view(torch.uint8), _span(bucket), None
                yield None  # it may be the parameter itself, which holds until the next is asked for
                continue
            buffer = next(turns)[: bucket[-1].end]
            for part in bucket:
                part.of(buffer).copy_(_agreed(part, parameters))
            yield buffer, _span(bucket), None

    def _incoming(
        self, manifest: WeightManifest, memory: Memory | None
    ) -> Iterator[tuple[torch.Tensor, str, tuple[list[Part], torch.Tensor]]]:
        """The memory of every bucket."""
        device, buckets = self._wire.device, plan_buckets(manifest, self._group.bucket_bytes)
        sizes = [bucket[-1].end for bucket in buckets]
        buffers = memory.of(sizes, device) if memory else (new_bytes(size, device) for size in sizes)
        for bucket, buffer in zip(buckets, buffers, strict=True):
            yield buffer, _span(bucket), (bucket, buffer)

    def _in_turn(self, tensors: Iterable[tuple[torch.Tensor, str, _T] | None]) -> Iterator[_T]:
        """Broadcasts tensors, two at a time: the next but one is asked for when the first is through, and behind a None
        the next when all are. Of each that is through, what came with it."""
        under_way: deque[tuple[str, _T]] = deque()
        verb = "send" if self._group.rank == 0 else "receive"

        def finish() -> _T:
            what, with_it = under_way.popleft()
            with self._explained(f"{verb} {what}"):
                self._wire.finish()
            return with_it

        for each in tensors:
            if each is not None:
                tensor, what, with_it = each
                with self._explained(f"{verb} {what}"):
                    self._wire.start(tensor)
                under_way.append((what, with_it))
            while len(under_way) >= (1 if each is None else _AT_ONCE):
                yield finish()
        while under_way:
            yield finish()

    def _settle(self) -> None:
        """Whoever left now would end for the others what is still on its way to them: they take it for dead."""
        with self._explained("hear that all are through"):
            self._wire.settle()

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


def _agreed(part: Part, parameters: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """The next parameter, which must be the announced one."""
    name, tensor = next(parameters, ("nothing", torch.empty(0)))
    got = (name, tensor.dtype, tuple(tensor.shape))
    if got != (part.name, part.dtype, part.shape):
        raise WeightSyncError(
            f"weights: the manifest announces {part.name} {dtype_name(part.dtype)}{list(part.shape)}, but the learner "
            f"sends {name} {dtype_name(tensor.dtype)}{list(tensor.shape)}; build the manifest from the same parameters"
        )
    return tensor.detach()


def _span(bucket: list[Part]) -> str:
    return bucket[0].name if len(bucket) == 1 else f"{bucket[0].name} … {bucket[-1].name}"
