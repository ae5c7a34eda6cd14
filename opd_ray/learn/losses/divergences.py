"""Divergences between student p = π_θ and frozen model q, [N] nats, from their log-probs on the same outcomes.

The student's gradient is right only where the outcomes hold all the mass (a tail bucket, renormalised, or the whole
vocabulary). On a truncated support :func:`diverge` holds the weights of the gradient constant.
"""

from __future__ import annotations

import math

import torch

from opd_ray.config.method import Divergence
from opd_ray.learn.losses import MAX_LOG_RATIO
from opd_ray.learn.losses.support import Outcomes


def reverse_kl(outcomes: Outcomes) -> torch.Tensor:
    """KL(p‖q) = Σ p (log p − log q): mode-seeking, the divergence of on-policy distillation (METHOD §4.2)."""
    return _kl(outcomes, outcomes.log_p, outcomes.log_q)


def forward_kl(outcomes: Outcomes) -> torch.Tensor:
    """KL(q‖p) = Σ q (log q − log p): mass-covering (Hinton et al. 2015; METHOD §4.2)."""
    return _kl(outcomes, outcomes.log_q, outcomes.log_p)


def jsd(outcomes: Outcomes, beta: float) -> torch.Tensor:
    """β·KL(q‖m) + (1 − β)·KL(p‖m) with m = β q + (1 − β) p, 0 < β < 1 (GKD, arXiv 2306.13649, eq. 1).

    Divided by β it tends to the forward KL for β → 0, divided by 1 − β to the reverse KL for β → 1.
    """
    log_m = _log_mixture(outcomes, beta)
    return beta * _kl(outcomes, outcomes.log_q, log_m) + (1 - beta) * _kl(outcomes, outcomes.log_p, log_m)


def diverge(name: Divergence, outcomes: Outcomes, beta: float = 0.5) -> torch.Tensor:
    """The divergence by name. On a truncated support S with f(p_i, q_i) the summand of the divergence:

        value     Σ_S f(p_i, q_i)
        gradient  Σ_S ∇p_i · sg[∂f/∂p_i + const],   ∂f/∂p_i + const =
                  log p_i − log q_i          reverse KL
                  −q_i / p_i                 forward KL, whose plain sum has just this gradient
                  (1 − β) log(p_i / m_i)     JSD_β

    The constant drops out over a whole distribution (Σ ∇p_i = 0) but not over a truncated one: there the reverse
    KL's +1 raises a token only where q > e·p and collapses the student (METHOD §4.3, arXiv 2605.11182).
    """
    if name == "forward_kl":
        return forward_kl(outcomes)
    value = reverse_kl(outcomes) if name == "reverse_kl" else jsd(outcomes, beta)
    if not outcomes.truncated:
        return value
    log_p = outcomes.log_p.detach()
    if name == "reverse_kl":
        slope = log_p - outcomes.log_q
    else:
        slope = (1 - beta) * (log_p - _log_mixture(outcomes, beta).detach())
    through = outcomes.total(outcomes.log_p.exp() * slope)
    return value.detach() + (through - through.detach())


def entropy(outcomes: Outcomes, logprobs: torch.Tensor) -> torch.Tensor:
    """−Σ r log r of one of the two distributions on the outcomes, [N] nats."""
    return -_kl(outcomes, logprobs, torch.zeros_like(logprobs))


def _kl(outcomes: Outcomes, log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Σ a (log a − log b), where an outcome with a = 0 contributes 0."""
    a = log_a.exp()
    return outcomes.total(a * (log_a - log_b).masked_fill(a == 0, 0.0))


def _log_mixture(outcomes: Outcomes, beta: float) -> torch.Tensor:
    return torch.logaddexp(outcomes.log_q + math.log(beta), outcomes.log_p + math.log1p(-beta))


def k2(logprobs: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """½ (log r)², [N]: biased, but its gradient's mean on the student's own samples is that of the reverse KL."""
    return 0.5 * (log_q - logprobs).square()


def k3(logprobs: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r, [N]: its mean on the student's own samples is the reverse KL, never negative. |log r| counts up to
    MAX_LOG_RATIO.

    Its gradient is (1 − r) ∇log p, whose mean is −Σ q ∇log p: to minimise it is to descend the *forward* KL(q‖p).
    A rare token that q likes has a huge r: the gradient has a far larger variance than that of k2.
    """
    log_ratio = (log_q - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
