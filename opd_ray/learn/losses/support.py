"""The outcomes on which student and frozen model are compared, and what becomes of the mass outside (METHOD §4.3).

A support is the teacher's top-k, the student's top-k, or the whole vocabulary. Outside a top-k support the mass is

    bucket         one more outcome: the exact divergence of the two distributions with their tails merged,
                   non-negative, a lower bound of the full one and equal to it for k ≥ V
    renormalise    divided away on both sides
    stop_gradient  left out of the sum; see :func:`opd_ray.learn.losses.divergences.diverge`
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from opd_ray.config.method import Support, Tail
from opd_ray.errors import RunError
from opd_ray.learn.losses import Head, ScoredTokens, TokenBatch, is_any_of

MIN_TAIL_MASS = torch.finfo(torch.float32).eps
"""Smallest tail mass that is told from 0, near what float32 log-probs resolve. Without this floor a
teacher whose rounded top-k sums to 1 would make the divergence infinite."""


@dataclass(frozen=True)
class Outcomes:
    """Two distributions over the same K outcomes at each of N tokens, in log-probs."""

    log_p: torch.Tensor
    """[N, K] of the student, with gradient."""
    log_q: torch.Tensor
    """[N, K] of the frozen model."""
    known: torch.Tensor | None = None
    """[N, K] or [1, K] bool: False where an entry is no outcome; None when all are."""
    truncated: bool = False
    """The sums of both stay below 1, as mass outside is left out."""

    def total(self, terms: torch.Tensor) -> torch.Tensor:
        """[N] sum of ``terms`` [N, K] over the outcomes."""
        return (terms if self.known is None else terms.masked_fill(~self.known, 0.0)).sum(-1)


def compare(batch: TokenBatch, scored: ScoredTokens, support: Support, tail: Tail, head: Head | None) -> Outcomes:
    """Student and scorer on a support; ``head`` is the scorer's output layer, for support=full.

    Raises RunError when the scores lack what the support needs.
    """
    if support == "full":
        return _on_vocabulary(batch, scored, head)
    if support == "teacher_top_k":
        ids, log_q = scored.topk_ids, scored.topk_logprobs
    else:
        ids, log_q = batch.given_ids, scored.given_logprobs
    if ids is None or log_q is None:
        raise RunError(
            f"support={support} needs log-probs of {'the top-k' if support == 'teacher_top_k' else 'given ids'} "
            "(k ≥ 1), but the scores have none; ask the scorer for them"
        )
    # Does a row hold every id of the student's? k ≥ V does not say so: a padded vocabulary has ids that it lacks.
    complete = (ids < batch.vocab_size).sum(-1, keepdim=True) >= batch.vocab_size
    return _with_tail(_on_ids(batch, scored, ids, log_q), tail, complete)


def _on_ids(batch: TokenBatch, scored: ScoredTokens, ids: torch.Tensor, log_q: torch.Tensor) -> Outcomes:
    """Both distributions on ids [N, k].

    Models of one family may pad their vocabulary differently: an id that the student does not have cannot be
    sampled (p = 0), and q's mass on it counts as tail. Of the EOS set only the first id is an outcome; another
    one stands in for it where it is the only one in the support.
    """
    known = ids < batch.vocab_size
    ids = ids.clamp(max=batch.vocab_size - 1)
    if batch.merges_stops:
        if scored.stop_logprobs is None:
            raise RunError("the EOS set has several ids, but the scores lack stop_logprobs; ask the scorer for them")
        first, *others = batch.stop_token_ids
        other = is_any_of(ids, tuple(others))
        stands_in = other & (other.cumsum(-1) == 1) & ~(ids == first).any(-1, keepdim=True)
        ids = torch.where(stands_in, first, ids)
        log_q = torch.where(stands_in, scored.stop_logprobs.unsqueeze(-1), log_q)
        known &= ~other | stands_in
    # What is no outcome may be −inf, which would turn a masked gradient into nan.
    return Outcomes(batch.logprobs_of(ids), log_q.masked_fill(~known, 0.0), known)


def _on_vocabulary(batch: TokenBatch, scored: ScoredTokens, head: Head | None) -> Outcomes:
    """Both distributions over the ids that the two models share; padding ids of the larger one are left out."""
    hidden, head = states_of(scored, head)
    with torch.no_grad():
        logits = head(hidden)
        size = min(logits.shape[-1], batch.vocab_size)
        log_q = merged(logits[:, :size].log_softmax(-1), batch.stop_token_ids)
    ours = batch.logits[:, :size]
    normalizer = batch.log_normalizer if size == batch.vocab_size else ours.logsumexp(-1)
    log_p = merged(ours - normalizer.unsqueeze(-1), batch.stop_token_ids)
    if not batch.merges_stops:
        return Outcomes(log_p, log_q)
    known = torch.ones(1, size, dtype=torch.bool, device=log_p.device)
    known[:, list(batch.stop_token_ids[1:])] = False
    return Outcomes(log_p, log_q, known)


def states_of(scored: ScoredTokens, head: Head | None) -> tuple[torch.Tensor, Head]:
    """What a scorer's distribution over the whole vocabulary is made of. RunError where it is not there."""
    if head is None or scored.hidden is None:
        raise RunError("the full vocabulary needs the scorer's hidden states, but the scores have none; ask for them")
    return scored.hidden, head


def merged(logprobs: torch.Tensor, stop_token_ids: tuple[int, ...]) -> torch.Tensor:
    """log-probs [N, V] whose first stop id holds the mass of the set; the others keep theirs and must be masked."""
    if len(stop_token_ids) < 2:
        return logprobs
    index = torch.tensor(stop_token_ids[:1], device=logprobs.device)
    together = logprobs[:, list(stop_token_ids)].logsumexp(-1, keepdim=True)
    return logprobs.index_copy(-1, index, together)


def _with_tail(top: Outcomes, tail: Tail, complete: torch.Tensor) -> Outcomes:
    """What becomes of the mass outside of ``top``; a row that is ``complete`` [N, 1] bool has none."""
    if tail == "stop_gradient":
        return replace(top, truncated=not bool(complete.all()))
    both, inside = (top.log_p, top.log_q), [each.masked_fill(~top.known, -torch.inf) for each in (top.log_p, top.log_q)]
    if tail == "renormalise":
        # A row without a single known outcome has nothing to compare; 0 keeps it finite.
        masses = [each.logsumexp(-1, keepdim=True).clamp(min=-1e4) for each in inside]
        return Outcomes(*(each - mass for each, mass in zip(both, masses, strict=True)), top.known)
    tails = [tail_mass(each).log().unsqueeze(-1) for each in inside]
    with_tails = (torch.cat(pair, -1) for pair in zip(both, tails, strict=True))
    return Outcomes(*with_tails, torch.cat((top.known, ~complete), -1))


def tail_mass(logprobs: torch.Tensor) -> torch.Tensor:
    """1 − Σ exp(logprobs) over the last dimension, float32, at least MIN_TAIL_MASS.

    −expm1(logsumexp) in float64 keeps the digits that 1 − sum would cancel: float32 log-probs near 0 know
    the mass that is missing from 1 much better than float32 sums do. The clamp is on the probability
    and not on its logarithm, so the gradient at an empty tail is 0 instead of 0 · ∞.
    """
    return (-torch.expm1(logprobs.double().logsumexp(-1))).float().clamp(min=MIN_TAIL_MASS)
