"""Sampled-token policy gradient: the teacher's log-ratio as a detached advantage (METHOD §1).

    A = log π_T(y|s) − log π_θ(y|s)   detached;   ρ = π_θ(y|s) / μ(y|s)
    L = −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)

A is recomputed under the current student, so data of older weights still pulls towards the teacher.
The clip is PPO's (arXiv 1707.06347); there is no reward-to-go and no normalisation of A.
"""

from __future__ import annotations

import torch

from opd_ray.losses import TokenBatch, TokenLoss, student_metrics

MAX_LOG_RATIO = 20.0
"""Bound on |log ρ|, so that a token that μ hardly ever sampled gives a huge loss and not inf."""


class PolicyGradient:
    """L_OPD on the sampled token; needs no more of the teacher than that token's log-prob."""

    def __init__(self, clip_ratio: float) -> None:
        self.clip_ratio = clip_ratio

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        if batch.teacher is None:
            raise ValueError("the policy gradient needs the teacher's scores, but this batch has none")
        advantage = batch.teacher.logprobs - batch.logprobs.detach()
        ratio = (batch.logprobs - batch.behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        plain = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio) * advantage
        metrics = student_metrics(batch)
        metrics["clip_fraction"] = (clipped < plain).float().detach()
        return TokenLoss(-torch.minimum(plain, clipped), metrics)
