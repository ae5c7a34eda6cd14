"""What runs inside vLLM's worker processes: our transfer engine, the update call, and loading another checkpoint.

vLLM imports this module in every worker, because ``WorkerExtension`` is named as the engine's
``worker_extension_cls``; the import registers the transfer engine beside vLLM's own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.models.heads import outer_layers
from opd_ray.models.hub import local_directory
from opd_ray.models.vllm import TRANSFER_BACKEND
from opd_ray.weights.adapters import merged
from opd_ray.weights.beside import Memory, own_stream
from opd_ray.weights.manifest import num_bytes
from opd_ray.weights.transfer import WeightTransfer


class BroadcastEngine(WeightTransferEngine[TransferGroup, WeightManifest]):
    """vLLM's checkpoint-format update with this package's broadcasts underneath. The group's rank is that of the
    engine's first worker."""

    init_info_cls = TransferGroup
    update_info_cls = WeightManifest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._transfer, self._memory = WeightTransfer(), Memory()
        self._received: list[tuple[str, torch.Tensor]] | None = None

    def init_transfer_engine(self, init_info: TransferGroup) -> None:
        self._transfer.connect(dataclasses.replace(init_info, rank=init_info.rank + self.parallel_config.rank))

    def start_weight_update(self) -> None:
        # The CPU build repacks linear weights after loading; only a load inside the layer-wise
        # reload repacks them again, in place, so that captured graphs stay valid on GPUs.
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with torch.accelerator.synchronize(), which a CPU build refuses;
        # load_weights copies on the current stream, which orders it before the next step.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_beside(self, update_info: dict[str, Any]) -> None:
        """Takes a broadcast in while the engine goes on, for the update that follows; left to that where the device
        has no room for it."""
        manifest, self._received = self.parse_update_info(update_info), None
        if self._memory.has_room(num_bytes(manifest), self.device):
            with own_stream(self.device):
                self._received = list(self._transfer.receive(manifest, self._memory))

    def receive_weights(self, update_info: WeightManifest) -> None:
        staged, self._received = self._received, None
        received = self._transfer.receive(update_info) if staged is None else staged
        received = ((name, tensor.to(self.device)) for name, tensor in received)
        if update_info.base is not None:
            # Not as a LoRA of vLLM's: on CPUs it copies B for every token, and on GPUs it launches two kernels more for
            # every layer, at every step.
            base = _checkpoint(self.vllm_config, self.model, update_info.base)
            on_device = ((name, tensor.to(self.device)) for name, tensor in base)
            received = merged(on_device, dict(received), update_info.scale)
        self.model.load_weights(received)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._transfer.close()


class WorkerExtension:
    """Methods that vLLM mixes into its worker class, called by ``collective_rpc``."""

    def opd_receive(self, update_info: dict[str, Any]) -> None:
        """May run beside the steps."""
        self.weight_transfer_engine.receive_beside(update_info)

    def opd_update_weights(self, update_info: dict[str, Any]) -> None:
        """One whole update in one call: between separate calls the engine could step on half-loaded layers.

        After a failure the layers that were complete are new and the others are the former ones: the next whole
        update makes them agree again.
        """
        self.start_weight_update()
        try:
            self.update_weights(update_info)
        except BaseException:
            _give_up(self.get_model(), self.vllm_config)
            raise
        self.finish_weight_update()

    def opd_load(self, path: str) -> None:
        """Takes another checkpoint of the same architecture into the model at hand."""
        self.reload_weights(weights_iterator=_checkpoint(self.vllm_config, self.get_model(), path))


def _give_up(model: torch.nn.Module, config: VllmConfig) -> None:
    """Ends a layer-wise reload half way. vLLM would go on with it at the next start: weights that it kept of this
    update would complete layers of the next one too early, and those that came after would be dropped."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0  # for finalize: nothing came, put the former tensors back
    with set_current_vllm_config(config):
        finalize_layerwise_reload(model, config.model_config)


def _checkpoint(config: VllmConfig, model: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a checkpoint of ``model``'s architecture."""
    model_config = copy.copy(config.model_config)
    model_config.model = str(local_directory(path))
    weights = get_model_loader(config.load_config).get_all_weights(model_config, model)
    return _with_tied_head(weights, model_config.hf_text_config)


def _with_tied_head(weights: Iterable[tuple[str, Any]], config: Any) -> Iterator[tuple[str, Any]]:
    """``weights``, and a tied output layer under its own name as well: on CPUs vLLM keeps a repacked copy of it, which
    would stay that of the former checkpoint, without an error."""
    _, embedding, head = outer_layers(config) if config.tie_word_embeddings else (None, None, None)
    for name, tensor in weights:
        yield name, tensor
        if name == f"{embedding}.weight":
            yield f"{head}.weight", tensor


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, BroadcastEngine)
