"""Estimates of the reverse KL(π_θ‖q) from the one token that was sampled (Schulman, "Approximating KL divergence").

With r = q(y)/π_θ(y). k1 = −log r has a useless gradient when back-propagated (its mean does not depend on q): it is
offered as a detached advantage only, in :mod:`opd_ray.losses.advantage`.
"""

from __future__ import annotations

import torch

from opd_ray.losses import MAX_LOG_RATIO


def k2(logprobs: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """½ (log r)², [N]: biased, but its gradient's mean on the student's own samples is that of the reverse KL."""
    return 0.5 * (log_q - logprobs).square()


def k3(logprobs: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r, [N]: unbiased on the student's own samples, never negative. |log r| counts up to MAX_LOG_RATIO."""
    log_ratio = (log_q - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
