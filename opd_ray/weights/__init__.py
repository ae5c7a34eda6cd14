"""WeightTransport: the learner's side of a weight broadcast.

The engines' side is :meth:`opd_ray.generate.engine.GenerationEngine.connect` and ``update_weights``.
The driver starts both sides at once; neither side knows the other's actors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from opd_ray.errors import InputError, near
from opd_ray.messages import TransferGroup, WeightManifest


class WeightTransport(Protocol):
    """Sends named tensors, in the order of a manifest, to every member of a group."""

    def open(self, group: TransferGroup) -> None:
        """Forms the group as rank 0, after leaving the former one; raises WeightSyncError by the group's timeout."""

    def send(self, manifest: WeightManifest, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcasts every parameter; raises WeightSyncError when a member takes nothing for the group's timeout.

        After an error the group is of no more use: open another.
        """

    def close(self) -> None:
        """Leaves the group. Closing twice is allowed."""


def make_transport(backend: str) -> WeightTransport:
    """The transport for "gloo" (CPU tensors over TCP) or "nccl" (CUDA)."""
    if backend == "gloo":
        from opd_ray.weights.gloo import GlooTransport

        return GlooTransport()
    if backend == "nccl":
        from opd_ray.weights.nccl import NcclTransport

        return NcclTransport()
    raise InputError(f"weights.backend '{backend}' is unknown{near(backend, ['gloo', 'nccl'])}")
