"""Back-propagated reverse KL(π_θ‖q) on q's top-k and one bucket for everything else.

With S the k most probable tokens of the frozen model q (teacher or reference) and
p_r = 1 − Σ_S p_i, q_r = 1 − Σ_S q_i the mass outside:

    KL = Σ_{i∈S} p_i (log p_i − log q_i) + p_r (log p_r − log q_r)

This is the exact KL of the two distributions with the tail merged into one outcome: non-negative,
0 where they agree, a lower bound of the full KL, and equal to it for k ≥ V (then there is no tail). The
bucket is what removes the spurious gradient of the plain truncated sum, which raises a token only
where q > e·π_θ and collapses the student (METHOD §4.3; arXiv 2605.11182).
"""

from __future__ import annotations

import torch

from opd_ray.losses import ScoredTokens, TokenBatch, TokenLoss, student_metrics

MIN_TAIL_MASS = torch.finfo(torch.float32).eps
"""Smallest tail mass that is told from 0, near what float32 log-probs resolve. Without this floor a
teacher whose rounded top-k sums to 1 would make the divergence infinite."""


def bucketed_reverse_kl(batch: TokenBatch, scored: ScoredTokens) -> torch.Tensor:
    """KL(π_θ‖q) of each token's distribution, [N] nats, with gradient. ValueError when k is 0.

    Models of one family may pad their vocabulary differently; an id that the student does not have cannot be
    sampled (p = 0) and q's mass on it counts as tail.
    """
    vocab_size, num_alternatives = batch.logits.shape[-1], scored.topk_ids.shape[-1]
    if num_alternatives == 0:
        raise ValueError("the reverse KL needs the scorer's top-k log-probs (k ≥ 1), but they are empty")
    foreign = scored.topk_ids >= vocab_size
    ids = scored.topk_ids.clamp(max=vocab_size - 1)
    log_p = batch.logits.gather(-1, ids) - batch.log_normalizer.unsqueeze(-1)
    log_q = scored.topk_logprobs
    divergence = (log_p.exp() * (log_p - log_q)).masked_fill(foreign, 0.0).sum(-1)
    if num_alternatives >= vocab_size:
        return divergence
    p_tail = tail_mass(log_p.masked_fill(foreign, -torch.inf))
    q_tail = tail_mass(log_q.masked_fill(foreign, -torch.inf))
    return divergence + p_tail * (p_tail.log() - q_tail.log())


def tail_mass(logprobs: torch.Tensor) -> torch.Tensor:
    """1 − Σ exp(logprobs) over the last dimension, float32, at least MIN_TAIL_MASS.

    −expm1(logsumexp) in float64 keeps the digits that 1 − sum would cancel: float32 log-probs near 0 know
    the mass that is missing from 1 much better than float32 sums do. The clamp is on the probability
    and not on its logarithm, so the gradient at an empty tail is 0 instead of 0 · ∞.
    """
    return (-torch.expm1(logprobs.double().logsumexp(-1))).float().clamp(min=MIN_TAIL_MASS)


class ReverseKL:
    """L_OPD as the back-propagated KL(π_θ‖π_T) on the teacher's top-k with a tail bucket."""

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        if batch.teacher is None:
            raise ValueError("the reverse KL needs the teacher's scores, but this batch has none")
        values = bucketed_reverse_kl(batch, batch.teacher)
        return TokenLoss(values, student_metrics(batch))
