"""From one value per token to one number per step, with global denominators.

Each token's weight is fixed by the whole step and not by the micro-batch or the rank it landed in, so
splitting a step differently changes neither the loss nor the gradient:

    token     w = 1 / T             mean over all T tokens of the step
    sequence  w = 1 / (|o| · R)     mean over the |o| tokens of each rollout, then over all R rollouts

Student and golden rollouts are reduced apart, each with its own T and R.
"""

from __future__ import annotations

from typing import Literal

import torch


def token_weights(
    response_lengths: torch.Tensor, num_rollouts: int, num_tokens: int, reduction: Literal["sequence", "token"]
) -> torch.Tensor:
    """Weight of each response token of some rollouts, [Σ response_lengths] float32.

    ``response_lengths`` is [rollouts] int64, in the order of the packed tokens; ``num_rollouts`` and
    ``num_tokens`` count the whole step's rollouts of this source.
    """
    if reduction == "token":
        per_rollout = torch.full(response_lengths.shape, 1.0 / max(num_tokens, 1), device=response_lengths.device)
    else:
        per_rollout = 1.0 / (response_lengths.clamp(min=1) * max(num_rollouts, 1))
    return per_rollout.repeat_interleave(response_lengths)
