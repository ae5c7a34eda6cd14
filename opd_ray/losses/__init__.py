"""Per-token losses: pure functions of tensors, and the Protocol they share.

A loss returns one value per response token and knows nothing of rollouts, ranks or reductions;
:mod:`opd_ray.losses.reduction` weighs the values with the step's global denominators.
A new loss is a new small file and one line in :func:`make_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from opd_ray.config import LossConfig


@dataclass(frozen=True)
class ScoredTokens:
    """A frozen model's opinion on N tokens; nats, float32, no gradient."""

    logprobs: torch.Tensor
    """[N] log-prob of the token that was sampled."""
    topk_ids: torch.Tensor
    """[N, k] int64; k may be 0."""
    topk_logprobs: torch.Tensor
    """[N, k] under the full softmax."""

    def select(self, mask: torch.Tensor) -> ScoredTokens:
        return ScoredTokens(self.logprobs[mask], self.topk_ids[mask], self.topk_logprobs[mask])


@dataclass(frozen=True)
class TokenBatch:
    """N response tokens of one micro-batch, of one source."""

    logits: torch.Tensor
    """[N, V] float32: the student's logits that predict each token; carries the gradient."""
    tokens: torch.Tensor
    """[N] int64: the tokens that were sampled (or, for golden rollouts, given)."""
    behaviour_logprobs: torch.Tensor
    """[N] float32: log μ(y_t|s_t) of the policy that sampled; nan for golden rollouts."""
    teacher: ScoredTokens | None
    """None for golden rollouts."""
    reference: ScoredTokens | None
    """None for golden rollouts and where no reference is configured."""


@dataclass(frozen=True)
class TokenLoss:
    """One value per token, and per-token quantities worth logging (detached)."""

    values: torch.Tensor
    """[N] float32."""
    metrics: dict[str, torch.Tensor]
    """Name to [N]; averaged over all tokens of the step before they are logged."""


class Loss(Protocol):
    """L_OPD: how far the student is from the teacher on the tokens it sampled."""

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        """The loss of each token; raises ValueError when ``batch.teacher`` lacks what it needs."""
