"""Per-token losses: pure functions of tensors.

A loss returns one value per response token and knows nothing of rollouts, ranks or reductions;
:mod:`opd_ray.learn.losses.reduction` weighs the values with the step's global denominators.

    support       which outcomes two models are compared on, and what becomes of the rest
    divergences   reverse KL, forward KL, JSD on these outcomes; k2 and k3 on the sampled token
    vocabulary    the reverse KL once more, in few passes, where the outcomes are the whole vocabulary
    advantage     k1, task reward and importance weights: the policy gradient
    terms         the loss of one source, and the KL to the reference, as the configuration asks for them
    diagnostics   what is logged beside them
    reduction     from one value per token to one number per step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch

MAX_LOG_RATIO = 20.0
"""Bound on the logarithm of a probability ratio, whose exponential would overflow float32 beyond 88."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""A frozen model's output layer: hidden states [n, H] to logits [n, V] float32."""


@dataclass(frozen=True)
class ScoredTokens:
    """A frozen model's opinion on N tokens; nats, float32, no gradient. See SCORE_SCHEMA."""

    logprobs: torch.Tensor
    """[N] log-prob of the token that was sampled."""
    topk_ids: torch.Tensor | None = None
    """[N, k] int64; None unless asked for, and"""
    topk_logprobs: torch.Tensor | None = None
    """[N, k] under the full softmax."""
    given_logprobs: torch.Tensor | None = None
    """[N, k'] of the rollout's own topk_ids; None unless asked for."""
    stop_logprobs: torch.Tensor | None = None
    """[N] log P(stop); None unless asked for."""
    hidden: torch.Tensor | None = None
    """[N, H] in front of the output layer; None unless asked for."""
    spans: torch.Tensor | None = None
    """[N] int64: the span that each token is in, no number twice in a batch, -1 for none; None of a scorer with the
    student's tokenizer."""


@dataclass(frozen=True)
class Tokens:
    """N response tokens of one source, scored by the same models."""

    tokens: torch.Tensor
    """[N] int64: the tokens that were sampled (or, for golden rollouts, given)."""
    behaviour_logprobs: torch.Tensor
    """[N] float32: log μ(y_t|s_t) of the student that sampled; nan for golden and teacher rollouts."""
    teachers: Mapping[str, ScoredTokens] = field(default_factory=dict)
    """By name; empty where the loss compares with none."""
    reference: ScoredTokens | None = None
    """None where no reference is asked for."""
    given_ids: torch.Tensor | None = None
    """[N, k'] int64: the student's most probable tokens when it sampled; None unless asked for."""
    reward_advantages: torch.Tensor | None = None
    """[N] float32: Entry.reward_advantage of each token's rollout; None counts as 0."""
    teacher_advantages: torch.Tensor | None = None
    """[N] float32: the teacher's part of the advantage where all of it is data (policy=behaviour)."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch(Tokens):
    """Tokens and what the student thinks of them.

    Tokens of the EOS set count as one outcome, the first of the set: :attr:`logprobs` and :meth:`logprobs_of`
    give it the probability of them all (METHOD §3). ``plain_logprobs`` are those of the tokens as they are.
    """

    logits: torch.Tensor
    """[N, V] float32: the student's logits that predict each token; carries the gradient."""
    stop_token_ids: tuple[int, ...] = ()
    """The EOS set, as it is merged; empty or one id for nothing to merge."""

    def detached(self) -> TokenBatch:
        """The same without gradient, for what is logged; the pass over the vocabulary is not made again."""
        copy = replace(self, logits=self.logits.detach())
        copy.__dict__["log_normalizer"] = self.log_normalizer.detach()
        return copy

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def merges_stops(self) -> bool:
        return len(self.stop_token_ids) > 1

    @cached_property
    def log_normalizer(self) -> torch.Tensor:
        """[N] log Σ exp(logits), with gradient; one pass over the vocabulary for every term of the loss."""
        return _LogNormalizer.apply(self.logits)

    @cached_property
    def plain_logprobs(self) -> torch.Tensor:
        """[N] log π_θ(y_t|s_t) of the tokens as they are, with gradient."""
        return self.logits.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1) - self.log_normalizer

    @cached_property
    def logprobs(self) -> torch.Tensor:
        """[N] log π_θ(y_t|s_t) with the EOS set as one outcome, with gradient."""
        if not self.merges_stops:
            return self.plain_logprobs
        return torch.where(is_any_of(self.tokens, self.stop_token_ids), self.stop_logprobs, self.plain_logprobs)

    @cached_property
    def stop_logprobs(self) -> torch.Tensor:
        """[N] log P(stop), with gradient; raises IndexError without an EOS set."""
        return self.logits[:, list(self.stop_token_ids)].logsumexp(-1) - self.log_normalizer

    def logprobs_of(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, k] log-probs of ``ids`` [N, k], with gradient; the first stop id stands for the whole set."""
        logprobs = self.logits.gather(-1, ids) - self.log_normalizer.unsqueeze(-1)
        if not self.merges_stops:
            return logprobs
        return torch.where(ids == self.stop_token_ids[0], self.stop_logprobs.unsqueeze(-1), logprobs)


@dataclass(frozen=True)
class TokenLoss:
    """One value per token, and per-token quantities worth logging (detached)."""

    values: torch.Tensor
    """[N] float32."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name to [N]; averaged over all tokens of the source before they are logged."""


def block_rows(logits: torch.Tensor) -> int:
    """Rows of [N, V] that passes over them take at a time: on a CPU 1 MiB of logits, which stays in a core's cache,
    where to fill fresh pages takes longer than the arithmetic. What is kept of a block is made before the first one:
    between two blocks it would keep glibc from using their memory again."""
    return max(1, (2**18 if logits.device.type == "cpu" else 2**24) // logits.shape[-1])


class _LogNormalizer(torch.autograd.Function):
    """log Σ exp of each row, block by block."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor) -> torch.Tensor:
        normalizer, rows = logits.new_empty(len(logits)), block_rows(logits)
        for out, block in zip(normalizer.split(rows), logits.split(rows), strict=True):
            torch.logsumexp(block, -1, out=out)
        context.save_for_backward(logits, normalizer)
        return normalizer

    @staticmethod
    def backward(context: Any, of_normalizer: torch.Tensor) -> torch.Tensor:
        logits, normalizer = context.saved_tensors
        slope, rows = torch.empty_like(logits), block_rows(logits)
        columns = (tensor[:, None].split(rows) for tensor in (normalizer, of_normalizer))
        for out, block, shift, weight in zip(slope.split(rows), logits.split(rows), *columns, strict=True):
            torch.sub(block, shift, out=out).exp_().mul_(weight)
        return slope


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in it changed, through dataclasses, dicts and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{item.name: mapped(getattr(value, item.name), change) for item in fields(value)})
    return value


def is_any_of(ids: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
    """bool, in the shape of ``ids``; faster than torch.isin for the handful of ids of an EOS set."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for id_ in wanted:
        found |= ids == id_
    return found
