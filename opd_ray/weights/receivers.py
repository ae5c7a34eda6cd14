"""The receiving side of a broadcast for engines that hold a plain torch model.

vLLM's workers have their own: :mod:`opd_ray.weights.vllm_worker` for gloo, vLLM's for nccl.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from opd_ray.errors import InputError, WeightSyncError, near
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.weights.gloo import GlooGroup, receive


class WeightReceiver(Protocol):
    """Receives what a WeightTransport sends."""

    def connect(self, group: TransferGroup) -> None:
        """Joins the group, after leaving the former one."""

    def receive(self, manifest: WeightManifest) -> Iterable[tuple[str, torch.Tensor]]:
        """The named tensors of one broadcast, in the manifest's order; each is valid until the next."""


def make_receiver(backend: str, device: torch.device) -> WeightReceiver:
    """The receiver that matches ``make_transport(backend)``."""
    if backend == "gloo":
        return GlooReceiver()
    if backend == "nccl":
        from opd_ray.weights.nccl import NcclReceiver

        return NcclReceiver(device)
    raise InputError(f"weights.backend '{backend}' is unknown{near(backend, ['gloo', 'nccl'])}")


class GlooReceiver:
    """Receives CPU tensors over gloo."""

    def __init__(self) -> None:
        self._members: GlooGroup | None = None

    def connect(self, group: TransferGroup) -> None:
        self._members = None
        self._members = GlooGroup(group)

    def receive(self, manifest: WeightManifest) -> Iterable[tuple[str, torch.Tensor]]:
        if self._members is None:
            raise WeightSyncError("weights: update_weights was called before connect; connect the engine first")
        for bucket in receive(self._members, manifest):
            yield from bucket
