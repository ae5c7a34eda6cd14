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
from opd_ray.repetition import REPETITIVE_NGRAM, SHORTEST_TAIL

_SHORTEST = SHORTEST_TAIL - REPETITIVE_NGRAM + 1
"""Tokens of a tail at least: of a passage of SHORTEST_TAIL tokens, the first n-gram's end is the first that repeats."""

_MOST_NATS = 1e4
"""Of a token's disagreement: as good as infinite beside others, and sums of it keep those apart."""


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


def position_weights(disagreement: torch.Tensor, lengths: torch.Tensor, first: float) -> torch.Tensor:
    """[N] float32: ``first`` at the first token of each packed rollout; it falls to 1 as disagreement adds up

        g_t = 1 + (first − 1)(1 − F_{t−1}),   F_{t−1} = Σ_{u < t} d_u / Σ_u d_u

    with d = |log π_T − log μ| of the sampled tokens, ``disagreement`` [N] (IW-OPD, arXiv 2606.22600, as the authors'
    code has it, where π is the student that sampled, too; first = 1.5). Without any disagreement all have ``first``;
    behind a token that the teacher rules out, d = ∞, all have 1.
    """
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    d = disagreement.double().clamp(max=_MOST_NATS)
    total = d.new_zeros(len(lengths)).index_add(0, rows, d)
    before = d.cumsum(0) - d - (total.cumsum(0) - total)[rows]
    return (1 + (first - 1) * (1 - before / total.clamp(min=1e-8)[rows]).clamp(0, 1)).float()


def lowest(values: torch.Tensor, lengths: torch.Tensor, share: float) -> torch.Tensor:
    """[N] float32: 1 for the max(1, ⌊share · |o|⌋) lowest ``values`` [N] of each packed rollout, else 0.

    With the log-probs that tokens were sampled with: OPSA (arXiv 2608.31046), which leaves open among which tokens; its
    code takes those of a rank's batch. Ours are each rollout's own, so that it does not matter how a step is cut. Those
    left out keep their place in the denominators.
    """
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    order = values.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    rank = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[rows]
    number = (share * lengths.double() + 1e-9).floor().clamp(min=1)
    return torch.zeros_like(values).index_copy(0, order, (rank < number[rows]).to(values.dtype))


def before_tail(repetitive: torch.Tensor, truncated: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N] float32: 0 in the repetitive tail of a truncated rollout, else 1.

    ``repetitive`` is [N] float32 of packed rollouts, ``truncated`` [rollouts] bool. The tail is the suffix with the
    largest Σ (repetitive − ¾): nearly all of its tokens repeat, from its first one on, however many did so before it (a
    long derivation repeats an n-gram early, and all that follows is worth training on). A tail that is no longer than
    a passage said twice in passing is none. What is masked keeps its place in the denominators: the rest of the step
    weighs what it weighs without the mask.
    """
    if not repetitive.numel():
        return torch.ones_like(repetitive)
    score = repetitive.long() * 4 - 3
    before = score.cumsum(0) - score
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(score), device=lengths.device)
    ends = lengths.cumsum(0)
    lowest = before.new_zeros(len(lengths)).scatter_reduce(0, rows, before, "amin", include_self=False)
    candidates = torch.where(before == lowest[rows], position, -1)
    start = torch.full_like(lowest, -1).scatter_reduce(0, rows, candidates, "amax")
    loops = truncated & (score.cumsum(0)[ends.clamp(min=1) - 1] > lowest) & (ends - start >= _SHORTEST)
    return 1.0 - ((position >= start[rows]) & loops[rows]).float()
