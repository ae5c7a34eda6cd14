"""From one value per token to one number per step, with global denominators.

Each token's weight is fixed by the whole step and not by the micro-batch or the rank it landed in, so
splitting a step differently changes neither the loss nor the gradient:

    token     w = 1 / T             mean over all T tokens of the step
    sequence  w = 1 / (|o| · R)     mean over the |o| tokens of each rollout, then over all R rollouts
    sum       w = 1

Each source is reduced apart, with its own T and R.
"""

from __future__ import annotations

from typing import Literal

import torch

from opd_ray.messages import Count


def token_weights(
    response_lengths: torch.Tensor, count: Count, reduction: Literal["token", "sequence", "sum"]
) -> torch.Tensor:
    """Weight of each response token of some rollouts, [Σ response_lengths] float32.

    ``response_lengths`` is [rollouts] int64, in the order of the packed tokens; ``count`` is the whole step's of
    the rollouts that the loss is averaged over.
    """
    if reduction == "sequence":
        per_rollout = 1.0 / (response_lengths.clamp(min=1) * max(count.rollouts, 1))
    else:
        weight = 1.0 / max(count.tokens, 1) if reduction == "token" else 1.0
        per_rollout = torch.full(response_lengths.shape, weight, device=response_lengths.device)
    return per_rollout.repeat_interleave(response_lengths)


def before_repetition(repetitive: torch.Tensor, truncated: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N] float32: 0 from a truncated rollout's first repetitive token on, else 1.

    ``repetitive`` is [N] float32 of packed rollouts, ``truncated`` [rollouts] bool. What is masked keeps its place in
    the denominators: the rest of the step weighs what it weighs without the mask.
    """
    seen = repetitive.long().cumsum(0)
    starts = lengths.cumsum(0) - lengths
    before = torch.where(starts > 0, seen[(starts - 1).clamp(min=0)], 0)
    within = seen - before.repeat_interleave(lengths)
    return 1.0 - ((within > 0) & truncated.repeat_interleave(lengths)).float()
