"""What StableOPD adds to L_OPD: cross-entropy on golden solutions, and the KL to a frozen reference."""

from __future__ import annotations

from typing import Literal

import torch

from opd_ray.losses import TokenBatch, TokenLoss
from opd_ray.losses.reverse_kl import bucketed_reverse_kl

MAX_LOG_RATIO = 20.0
"""Bound on |log π_ref − log π_θ| in k3, whose exponential would overflow beyond 88."""


def sft_cross_entropy(batch: TokenBatch) -> TokenLoss:
    """−log π_θ(y_t|s_t) of the given tokens."""
    return TokenLoss(-batch.logprobs, {"golden_logprob": batch.logprobs.detach()})


def reference_kl(batch: TokenBatch, estimator: Literal["top_k", "k3"]) -> TokenLoss:
    """KL(π_θ‖π_ref) at each position: on the reference's top-k, or estimated from the sampled token.

    k3 = r − 1 − log r with r = π_ref(y)/π_θ(y) (Schulman, "Approximating KL divergence"): unbiased for
    tokens that π_θ sampled, never negative. Raises ValueError without reference scores.
    """
    if batch.reference is None:
        raise ValueError("the KL to the reference needs the reference's scores, but this batch has none")
    if estimator == "top_k":
        values = bucketed_reverse_kl(batch, batch.reference)
    else:
        log_ratio = (batch.reference.logprobs - batch.logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values = torch.expm1(log_ratio) - log_ratio
    return TokenLoss(values, {"reference_logprob": batch.reference.logprobs})
