"""Output layers: the student's, which runs in pieces under its loss, and those of frozen models, loaded alone.

A causal LM is a body that turns tokens into hidden states and a head that turns these into logits. The states are
small (H numbers a token), the logits are not (V), so the student's body hands out states of response tokens only, and
:class:`ResponseModel` leaves it to the loss to ask its head for as many logits at a time as it can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from opd_ray.config import STUDENT, Config, ScorerConfig
from opd_ray.errors import InputError
from opd_ray.models import local_directory

_PROBE_TOKENS = 4
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Largest difference of two ways to the same logits, relative to their size, by precision."""


LossOfRows = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of a piece, its logits [n, V]) to that piece's share of the loss."""


class Consumer(Protocol):
    """What the loss of one micro-batch is to the student's head."""

    def __call__(self, hidden: torch.Tensor, head: ResponseHead) -> torch.Tensor:
        """The loss, from states [N, H] and the layer that makes logits of them."""


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


class ResponseHead(torch.nn.Linear):
    """An output layer whose forward pass can hold a whole loss.

    DeepSpeed's ZeRO-3 gathers a module's parameters around its forward and its backward pass. With the loss inside
    they are gathered once each, however many pieces the loss cuts its tokens into, so ranks whose numbers of pieces
    differ still take part in the same collectives.
    """

    consumer: Consumer | None = None
    transform: LogitTransform = LogitTransform()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) if self.consumer is None else self.consumer(hidden, self)

    def sum_losses(self, hidden: torch.Tensor, sizes: Sequence[int], loss: LossOfRows) -> torch.Tensor:
        """Σ loss(i, logits of the i-th piece of ``hidden``), pieces of ``sizes`` rows that make up all of it.

        Logits and whatever a loss computes from them live for one piece only: its gradient is taken at once, and what
        stays for the backward pass is the gradient of ``hidden`` and that of the layer.
        """
        return _SumOfPieces.apply(hidden, self.weight, self.bias, self.transform, tuple(sizes), loss)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] float32, with gradient; they stay for the backward pass."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))


class _SumOfPieces(torch.autograd.Function):
    """ResponseHead.sum_losses."""

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        sizes: tuple[int, ...],
        loss: LossOfRows,
    ) -> torch.Tensor:
        layer = [tensor.detach().requires_grad_() for tensor in (weight, bias) if tensor is not None]
        of_hidden = torch.empty_like(hidden)
        of_layer = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in layer]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for index, (rows, target) in enumerate(zip(hidden.split(sizes), of_hidden.split(sizes), strict=True)):
            states = rows.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(index, transform(torch.nn.functional.linear(states, *layer)))
            of_states, *of_piece = torch.autograd.grad(value, [states, *layer])
            target.copy_(of_states)
            for gradient, part in zip(of_layer, of_piece, strict=True):
                gradient.add_(part)
            total += value.detach()
        context.save_for_backward(of_hidden, *of_layer)
        context.dtype = weight.dtype
        return total.float()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, *of_layer = context.saved_tensors
        scaled = [(part * gradient).to(context.dtype) for part in of_layer]
        return of_hidden * gradient.to(of_hidden.dtype), *(scaled + [None])[:2], None, None, None


class ResponseModel(torch.nn.Module):
    """A causal LM that ends in a loss on its response tokens; its [B, T, V] logits never exist."""

    def __init__(self, causal_lm: torch.nn.Module) -> None:
        """Changes the class of the output layer of ``causal_lm``, which otherwise works as before.

        Raises InputError when body and output layer do not make the model's own logits.
        """
        super().__init__()
        self.causal_lm = causal_lm
        config = causal_lm.config.get_text_config()
        _check_head(causal_lm, config)
        head = causal_lm.get_output_embeddings()
        head.__class__ = ResponseHead
        head.transform = transform_of(config)

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_output_embeddings().out_features

    def consume(self, consumer: Consumer) -> None:
        """Sets what the next forward pass ends in. Apart from it, as DeepSpeed looks for tensors in its arguments."""
        self.causal_lm.get_output_embeddings().consumer = consumer

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, logit_index: torch.Tensor
    ) -> torch.Tensor:
        """What the consumer makes of the states at ``logit_index`` [N] in the flattened ``input_ids`` [B, T].

        Without an attention mask: rows are padded on the right, where causal attention never looks;
        packed rows are told apart by their ``position_ids``.
        """
        body = self.causal_lm.base_model
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        head = self.causal_lm.get_output_embeddings()
        try:
            return head(hidden.flatten(0, 1).index_select(0, logit_index))
        finally:
            head.consumer = None


@torch.no_grad()
def _check_head(causal_lm: torch.nn.Module, config: Any) -> None:
    """Body, output layer and transform must give what the model itself gives."""
    name = type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    if type(head) is not torch.nn.Linear and not isinstance(head, ResponseHead):
        raise InputError(
            f"student: the output layer of {name} is a {type(head).__name__}, expected a linear layer; "
            "use an architecture with a plain lm_head"
        )
    vocabulary = causal_lm.get_input_embeddings().num_embeddings
    tokens = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % vocabulary
    own = causal_lm(input_ids=tokens, use_cache=False).logits.float()
    hidden = causal_lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    ours = transform_of(config)(torch.nn.functional.linear(hidden, head.weight, head.bias)).log_softmax(-1)
    difference = float((ours - own.log_softmax(-1)).abs().max())
    tolerance = _PROBE_TOLERANCE.get(head.weight.dtype, 1e-3) * max(1.0, float(own.std()))
    if not difference <= tolerance:
        raise InputError(
            f"student: {name} does something unknown to its logits (log-probs differ by {difference:.2g} nats from "
            "body and output layer); known are logit_scale, logits_scaling, final_logit_softcapping in config.json"
        )


def load_head(path: str | Path, dtype: torch.dtype, device: torch.device) -> FrozenHead:
    """The output layer of the checkpoint at ``path`` alone, [V, H] in ``dtype``; nothing else of it is read.

    Raises InputError when there is none in safetensors files, or when it is no plain linear layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = local_directory(str(path))
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    layer = skeleton.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise InputError(
            f"{path}: the output layer of {type(skeleton).__name__} is a {type(layer).__name__}, expected a linear "
            "one; compare on top_k instead of the full vocabulary"
        )
    names = {id(module): name for name, module in skeleton.named_modules()}
    tied = bool(config.get_text_config().tie_word_embeddings)
    source = skeleton.get_input_embeddings() if tied else layer
    weight = _read_tensor(directory, f"{names[id(source)]}.weight", skeleton.base_model_prefix)
    bias = _read_tensor(directory, f"{names[id(layer)]}.bias", "") if layer.bias is not None else None
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
        scorers["reference"] = config.reference
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


def _read_tensor(directory: Path, name: str, prefix: str) -> torch.Tensor:
    """One tensor of a safetensors checkpoint, under its own name or without the base model's prefix."""
    from safetensors import safe_open

    candidates = [name] + ([name.removeprefix(f"{prefix}.")] if prefix else [])
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            present = set(tensors.keys())
            for candidate in candidates:
                if candidate in present:
                    return tensors.get_tensor(candidate)
    raise InputError(
        f"{directory}: none of its {len(files)} safetensors files has the output layer '{name}'; "
        "save it with save_pretrained, or compare on top_k instead of the full vocabulary"
    )


def chunk_rows(vocab_size: int, logits_mb: int) -> int:
    """Tokens whose float32 logits fill ``logits_mb`` MiB; at least 1."""
    return max(1, math.floor(logits_mb * 2**20 / (4 * vocab_size)))
