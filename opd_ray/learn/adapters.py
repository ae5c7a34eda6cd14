"""Low-rank adapters on a student whose own weights are frozen (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from opd_ray.config import LoraConfig
from opd_ray.errors import InputError
from opd_ray.models import hub
from opd_ray.weights.adapters import A, B

_NAME = "default"
"""Of the one adapter that a layer has, which peft writes into the names of its parameters."""


class Adapters:
    """The adapters of a model, whose other parameters take no gradient any more."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[str], lora: LoraConfig) -> None:
        """Puts one on each of ``layers``; as B begins at 0, the model computes what it did before.

        Raises InputError for a layer that the model has not, or that is not linear.
        """
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        self.lora = lora
        for layer in layers:
            _check_linear(model, layer)
        config = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(layers))
        inject_adapter_in_model(config, model, _NAME)
        self._layers = {layer: model.get_submodule(layer) for layer in layers}
        for module in self._layers.values():  # peft makes them float32 beside a bfloat16 base
            for part in (module.lora_A, module.lora_B):
                part.to(module.get_base_layer().weight.dtype)

    def weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        """A and B of every layer, as they are sent and saved."""
        return [
            (layer + kind, getattr(module, part)[_NAME].weight)
            for layer, module in self._layers.items()
            for kind, part in ((A, "lora_A"), (B, "lora_B"))
        ]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model is the base that training began with."""
        for module in self._layers.values():
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self._layers.values():
                module.enable_adapters(True)


def write_adapter(directory: Path, weights: Mapping[str, torch.Tensor], base: str, lora: LoraConfig) -> None:
    """Writes adapters by name (see ``Adapters.weights``) as peft loads them onto the checkpoint ``base``."""
    from peft import LoraConfig as PeftConfig
    from safetensors.torch import save_file

    layers = [name.removesuffix(A) for name in weights if name.endswith(A)]
    repository, commit = hub.parts(base) if hub.is_pinned(base) else (base, None)
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=ends if lora.targets == "all-linear" else list(lora.targets),
        base_model_name_or_path=repository,
        revision=commit,
        inference_mode=True,
    ).save_pretrained(directory)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _check_linear(model: torch.nn.Module, layer: str) -> None:
    try:
        kind = type(model.get_submodule(layer)).__name__
    except AttributeError:
        kind = "weight of no layer"
    if kind != "Linear":
        raise InputError(
            f"student.lora: {layer} of {type(model).__name__} is a {kind}, expected a Linear layer; name the linear "
            "ones in student.lora.targets"
        )
