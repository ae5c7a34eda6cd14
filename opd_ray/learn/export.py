"""A student on disk, as Hugging Face and vLLM load it: trained weights beside everything else of the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_ray.config import LoraConfig
from opd_ray.learn.adapters import write_adapter
from opd_ray.models.checkpoints import read_weights, save_model
from opd_ray.weights.adapters import merged

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")

ADAPTER = "adapter"
"""Directory beside a student's files that holds what was trained of it, where that is adapters."""


def write_trained(
    directory: Path,
    model: Any,
    trained: Mapping[str, torch.Tensor],
    source: Path,
    stop_token_ids: Sequence[int],
    *,
    base: str,
    lora: LoraConfig | None,
) -> None:
    """Writes what a learner has trained, by name, of the student in ``source``: all its weights, or with ``lora`` the
    adapters of the checkpoint ``base``, which go into "adapter/" alone and merged with it into ``directory``."""
    if lora:
        write_adapter(directory / ADAPTER, trained, base, lora)
        trained = with_adapters(trained, lora, source, model.config.dtype)
    write_student(directory, model, trained, source, stop_token_ids)


def with_adapters(
    adapters: Mapping[str, torch.Tensor], lora: LoraConfig, source: Path, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every weight in the files of ``source``, in ``dtype``, those of layers that have an adapter merged with it."""
    weights = merged(read_weights(str(source)), adapters, lora.scale)
    return {name: weight.to(dtype) for name, weight in weights}


def write_student(
    directory: Path, model: Any, parameters: Mapping[str, torch.Tensor], source: Path, stop_token_ids: Sequence[int]
) -> None:
    """Writes a checkpoint into ``directory``: ``parameters`` by name and ``model``'s own buffers.

    Every file of ``source`` that is no weight file (tokenizer, chat template, generation settings, config) is taken as
    it is.
    """
    from transformers import GenerationConfig

    if (source / "generation_config.json").exists():
        # Published ones can be invalid (a temperature without sampling) and then refuse to be saved; the original is
        # copied below.
        model.generation_config = GenerationConfig()
    persistent = model.state_dict().keys()
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    save_model(model, directory, state_dict={**parameters, **buffers})
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(file, directory / file.name)
    if len(stop_token_ids) > 1:
        # Whoever serves the student must stop where the run did: at the teacher's EOS as well.
        path = directory / "generation_config.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | {"eos_token_id": list(stop_token_ids)}, indent=2) + "\n")
