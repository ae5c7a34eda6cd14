"""Which layers of a student get low-rank adapters, by the names and shapes in its files; nothing of a model is loaded.

Only a weight that is read under the name its layer has in the model can be merged with an adapter wherever one arrives,
so what the files do not name cannot be trained.
"""

from __future__ import annotations

import re
from pathlib import Path

from opd_ray.config import LoraConfig
from opd_ray.errors import InputError, near
from opd_ray.models.weights import headers

_IN_A_BLOCK = re.compile(r"(.+\.\d+\..+)\.weight")
"""A layer's weight, as "model.layers.0.self_attn.q_proj.weight": embedding and output layer have no number."""


def adapted_layers(where: str, directory: Path, lora: LoraConfig) -> list[str]:
    """Names of the layers that ``lora.targets`` asks for, in the order of the files.

    Raises InputError, which names the checkpoint as ``where``, for a target that no layer's name ends with.
    """
    layers = _linear_layers(where, directory)
    if lora.targets == "all-linear":
        return layers
    asked = {target: [layer for layer in layers if f".{layer}".endswith(f".{target}")] for target in lora.targets}
    for target, found in asked.items():
        if not found:
            ends = {layer.rpartition(".")[2] for layer in layers}
            raise InputError(
                f"student.lora.targets: the name of no linear layer in a block of {where} ends with '{target}'"
                f"{near(target, ends)}"
            )
    wanted = {layer for found in asked.values() for layer in found}
    return [layer for layer in layers if layer in wanted]


def _linear_layers(where: str, directory: Path) -> list[str]:
    layers = [
        match[1] for name, shape, _ in headers(directory) if (match := _IN_A_BLOCK.fullmatch(name)) and len(shape) == 2
    ]
    if not layers:
        raise InputError(
            f"{where}: student.lora finds no linear layers of a transformer's blocks in its *.safetensors files; give "
            "a checkpoint that save_pretrained wrote"
        )
    return layers
