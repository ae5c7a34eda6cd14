"""Weight broadcasts between GPUs, over vLLM's own NCCL backend.

The learner's side wraps vLLM's trainer engine; on the generators' side vLLM's workers run
vLLM's receiver. Waits inside NCCL have no timeout of their own: the driver's deadlines end them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_common import trainer_init as join
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest

_NOTHING = WeightManifest(version=-1, names=(), dtypes=(), shapes=())


class NcclTransport:
    """WeightTransport over NCCL, from the current CUDA device."""

    def __init__(self) -> None:
        self._trainer: NCCLTrainerWeightTransferEngine | None = None
        self._source = _Source()

    def open(self, group: TransferGroup) -> None:
        self.close()
        info = NCCLTrainerInitInfo(
            rank=group.rank,
            master_address=group.host,
            master_port=group.port,
            world_size=group.world_size,
            packed=True,
            packed_buffer_size_bytes=group.bucket_bytes,
        )
        try:
            self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=_DriverIsTheClient(), source=self._source
            )
        except Exception as error:
            raise WeightSyncError(
                f"weights: the learner could not form the nccl group of {group.world_size} at "
                f"{group.host}:{group.port}: {error}; check that every generator is alive and reaches it"
            ) from error

    def send(self, manifest: WeightManifest, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._trainer is None:
            raise WeightSyncError("weights: send was called before open; open the transfer group first")
        self._source.manifest, self._source.parameters = manifest, parameters
        try:
            self._trainer.send_weights()
        except Exception as error:
            raise WeightSyncError(
                f"weights: the nccl broadcast of version {manifest.version} failed: {error}; "
                "check the generators' logs, the group must be formed again"
            ) from error
        finally:
            self._source.parameters = ()

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None


class NcclReceiver:
    """WeightReceiver over NCCL for an engine with a plain torch model on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._communicator: Any = None
        self._bucket_bytes = 0

    def connect(self, group: TransferGroup) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
        self._bucket_bytes = group.bucket_bytes
        where = {"master_address": group.host, "master_port": group.port, "world_size": group.world_size}
        self._communicator = join(where, rank=group.rank)

    def receive(self, manifest: WeightManifest) -> Iterable[tuple[str, torch.Tensor]]:
        if self._communicator is None:
            raise WeightSyncError("weights: update_weights was called before connect; connect the engine first")
        received: list[tuple[str, torch.Tensor]] = []
        packed_nccl_broadcast_consumer(
            iterator=((meta.name, (list(meta.shape), meta.dtype)) for meta in _metadata(manifest)),
            group=self._communicator,
            src=0,
            post_unpack_func=received.extend,
            buffer_size_bytes=self._bucket_bytes,
            device=self._device,
        )
        return received


class _Source(WeightSource):
    """What vLLM's trainer engine sends next; set anew before each broadcast."""

    def __init__(self) -> None:
        self.manifest = _NOTHING
        self.parameters: Iterable[tuple[str, torch.Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        return _metadata(self.manifest)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.parameters:
            yield name, tensor.detach()


class _DriverIsTheClient:
    """The engines' control calls, which our driver makes itself: nothing is left to do here."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """GenerationEngine.connect."""

    def start_weight_update(self) -> None:
        """Part of GenerationEngine.update_weights."""

    def update_weights(self, update_info: Any) -> None:
        """Part of GenerationEngine.update_weights."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Part of GenerationEngine.update_weights."""


def _metadata(manifest: WeightManifest) -> list[ParamMeta]:
    columns = zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True)
    return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in columns]
