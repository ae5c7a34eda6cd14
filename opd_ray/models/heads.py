"""Output layers of frozen models: read from a checkpoint alone, and applied to hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd_ray.config import STUDENT, Config, ScorerConfig
from opd_ray.errors import InputError
from opd_ray.models.checkpoints import read_config
from opd_ray.models.hub import local_directory
from opd_ray.models.weights import weight_files

_PROBE_TOKENS = 4
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Largest difference of two ways to the same logits, relative to their size, by precision."""


@dataclass(frozen=True)
class LogitTransform:
    """What a few architectures do to their logits behind the output layer."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """float32, shifted so that each row's largest logit is 0; ``logits`` may be changed in place.

        The shift changes no probability, but lets float32 resolve the small masses that tail buckets are made of.
        """
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.sub_(logits.detach().amax(-1, keepdim=True))


def transform_of(config: Any) -> LogitTransform:
    """By the names that transformers' configurations use: Gemma's soft cap, Cohere's and Granite's scales."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def checked_transform(model: Any, where: str) -> LogitTransform:
    """That of a causal LM, whose body, output layer and transform give its own logits; InputError where they do not."""
    head, name = model.get_output_embeddings(), type(model).__name__
    transform = transform_of(model.config.get_text_config())
    tokens = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % model.get_input_embeddings().num_embeddings
    own = model(input_ids=tokens, use_cache=False).logits.float()
    ours = transform(head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state))
    difference = float((ours.log_softmax(-1) - own.log_softmax(-1)).abs().max())
    if not difference <= _PROBE_TOLERANCE[head.weight.dtype] * max(1.0, float(own.std())):
        raise InputError(
            f"{where}: {name} does something unknown to its logits (log-probs differ by {difference:.2g} nats from "
            "body and output layer); known are logit_scale, logits_scaling, final_logit_softcapping in config.json"
        )
    return transform


def load_head(path: str | Path, dtype: torch.dtype, device: torch.device) -> FrozenHead:
    """The output layer of the checkpoint at ``path`` alone, [V, H] in ``dtype``; nothing else of it is read.

    Raises InputError when there is none in safetensors files, or when it is no plain linear layer.
    """
    directory = local_directory(path)
    config = read_config(directory)
    skeleton, embedding, head = outer_layers(config)
    layer = skeleton.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise InputError(
            f"{path}: the output layer of {type(skeleton).__name__} is a {type(layer).__name__}, expected a linear "
            "one; compare on top_k instead of the full vocabulary"
        )
    source = embedding if config.get_text_config().tie_word_embeddings else head
    weight = _read_tensor(directory, f"{source}.weight", skeleton.base_model_prefix)
    bias = _read_tensor(directory, f"{head}.bias", "") if layer.bias is not None else None
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise InputError(
            f"{path}: its output layer is {list(weight.shape)}, but config.json says "
            f"{[layer.out_features, layer.in_features]}; the weights do not belong to the configuration"
        )
    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in (weight, bias)]
    return FrozenHead(*moved, transform_of(config.get_text_config()))


def load_heads(config: Config, student_path: str, device: torch.device) -> dict[str, FrozenHead]:
    """The output layers of the scorers that the loss compares on the whole vocabulary, by role. None of them follows
    the student, which the configuration refuses: its output layer would change and these do not."""
    scorers: dict[str, ScorerConfig] = {}
    terms = [config.loss.terms[source] for source in config.sources if config.needs_teacher(source)]
    if any(term.on_distributions and term.support == "full" for term in terms):
        scorers |= config.teachers
    if config.loss.reference.estimator == "full" and any(map(config.needs_reference, config.sources)):
        # Where the learner is the reference, its states are of the learner's precision.
        own = config.learner_is_reference
        scorers["reference"] = replace(config.reference, dtype=config.learner.dtype) if own else config.reference
    return {
        role: load_head(student_path if scorer.path == STUDENT else scorer.path, getattr(torch, scorer.dtype), device)
        for role, scorer in scorers.items()
    }


@dataclass(frozen=True)
class FrozenHead:
    """Head of a frozen model."""

    weight: torch.Tensor
    """[V, H]"""
    bias: torch.Tensor | None
    """[V]"""
    transform: LogitTransform = LogitTransform()

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] float32 from [n, H] of any precision; computed in that of the weights, as the model does."""
        return self.transform(torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))


def outer_layers(config: Any) -> tuple[Any, str, str]:
    """The model of a configuration without its weights, and the names of its embedding and of its output layer."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    return skeleton, names.get(id(embedding), ""), names.get(id(head), "")


def _read_tensor(directory: Path, name: str, prefix: str) -> torch.Tensor:
    """One tensor of a safetensors checkpoint, under its own name or without the base model's prefix."""
    from safetensors import safe_open

    files = weight_files(directory)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            present = set(tensors.keys())
            for candidate in (name, name.removeprefix(f"{prefix}.")):
                if candidate in present:
                    return tensors.get_tensor(candidate)
    raise InputError(
        f"{directory}: none of its {len(files)} safetensors files has the output layer '{name}'; "
        "save it with save_pretrained, or compare on top_k instead of the full vocabulary"
    )
