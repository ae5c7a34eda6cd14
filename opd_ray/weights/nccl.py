"""Weight broadcasts between GPUs, over vLLM's own NCCL backend.

The learner's side wraps vLLM's trainer engine; on the generators' side vLLM's workers run vLLM's
receiver. Waits inside NCCL have no timeout of their own: here joining a group, and one whole
broadcast, end by the group's timeout, the latter by an abort of the communicator. That was checked
with a stand-in for the communicator only, and not yet run on GPUs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_common import trainer_init as join
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.rooms.threads import within

_T = TypeVar("_T")
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
        self._timeout_s = group.timeout_s
        try:
            self._trainer = _joined(
                group.timeout_s,
                lambda: NCCLTrainerWeightTransferEngine.trainer_init(
                    info, client=_DriverIsTheClient(), source=self._source
                ),
            )
        except Exception as error:
            raise _cannot_join(group, error) from error

    def send(self, manifest: WeightManifest, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._trainer is None:
            raise WeightSyncError("weights: send was called before open; open the transfer group first")
        self._source.manifest, self._source.parameters = manifest, parameters
        try:
            with limited(self._trainer.model_update_group, self._timeout_s):
                self._trainer.send_weights()
        except Exception as error:
            self.close()  # what was aborted would take further calls without a word
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
            self._communicator = None
        self._bucket_bytes, self._timeout_s = group.bucket_bytes, group.timeout_s
        where = {"master_address": group.host, "master_port": group.port, "world_size": group.world_size}
        try:
            self._communicator = _joined(group.timeout_s, lambda: join(where, rank=group.rank))
        except Exception as error:
            raise _cannot_join(group, error) from error

    def receive(self, manifest: WeightManifest) -> Iterable[tuple[str, torch.Tensor]]:
        if self._communicator is None:
            raise WeightSyncError("weights: update_weights was called before connect; connect the engine first")
        received: list[tuple[str, torch.Tensor]] = []
        try:
            with limited(self._communicator, self._timeout_s):
                packed_nccl_broadcast_consumer(
                    iterator=((meta.name, (list(meta.shape), meta.dtype)) for meta in _metadata(manifest)),
                    group=self._communicator,
                    src=0,
                    post_unpack_func=received.extend,
                    buffer_size_bytes=self._bucket_bytes,
                    device=self._device,
                )
        except WeightSyncError:
            self._communicator = None
            raise
        return received


@dataclass(kw_only=True)
class LimitedNcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's, and how long a wait may take."""

    timeout_s: float


class LimitedNcclEngine(NCCLWeightTransferEngine):
    """vLLM's receiver in its workers, whose waits end."""

    init_info_cls = LimitedNcclInitInfo

    def init_transfer_engine(self, init_info: LimitedNcclInitInfo) -> None:
        self._timeout_s = init_info.timeout_s
        _joined(init_info.timeout_s, lambda: super(LimitedNcclEngine, self).init_transfer_engine(init_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if self.model_update_group is None:
            raise WeightSyncError("weights: update_weights was called before connect; connect the engine first")
        try:
            with limited(self.model_update_group, self._timeout_s):
                super().receive_weights(update_info)
        except WeightSyncError:
            self.model_update_group = None
            raise


@contextmanager
def limited(communicator: Any, timeout_s: float) -> Iterator[None]:
    """Aborts what the body does with a PyNcclCommunicator when it takes longer, and then raises WeightSyncError.

    The body itself may end without an error then, with what an aborted kernel left in its buffers.
    """
    late = threading.Event()

    def abort() -> None:
        late.set()
        communicator.disabled = True  # the body's further calls return at once
        with torch.accelerator.device_index(communicator.device.index):
            communicator.nccl.ncclCommAbort(communicator.comm)

    timer = threading.Timer(timeout_s, abort)
    timer.daemon = True
    timer.start()
    cause: Exception | None = None
    try:
        yield
    except Exception as error:
        if not late.is_set():
            raise
        cause = error
    finally:
        timer.cancel()
    if late.is_set():
        raise WeightSyncError(
            f"weights: an nccl broadcast did not end within {timeout_s:g} s and was aborted; check that the learner "
            "and every generator are alive, or raise weights.timeout_s"
        ) from cause


def _joined(timeout_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns, on this thread's device; TimeoutError after ``timeout_s``."""
    device = torch.accelerator.current_device_index() if torch.cuda.is_available() else None

    def on_device() -> _T:
        with torch.accelerator.device_index(device):
            return call()

    return within(timeout_s, on_device)


def _cannot_join(group: TransferGroup, error: Exception) -> WeightSyncError:
    return WeightSyncError(
        f"weights: rank {group.rank} could not form the nccl group of {group.world_size} at "
        f"{group.host}:{group.port}: {error}; check that every generator is alive and reaches it"
    )


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
