"""The loss of one source of rollouts and the anchor, as the configuration asks for them.

:func:`source_loss` is what TermConfig, AdvantageConfig and ImportanceConfig together mean for one batch of tokens;
:func:`reference_loss` is AnchorConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from opd_ray.config import AnchorConfig, LossConfig, TermConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import Head, ScoredTokens, TokenBatch, TokenLoss
from opd_ray.learn.losses.advantage import importance_weights, policy_gradient
from opd_ray.learn.losses.divergences import diverge, entropy, forward_kl, k2, k3
from opd_ray.learn.losses.support import Outcomes, compare
from opd_ray.messages import Source


def source_loss(
    batch: TokenBatch, source: Source, config: LossConfig, weights: Mapping[str, float], heads: Mapping[str, Head]
) -> TokenLoss:
    """The loss of each token of one source, without its coefficient.

    ``weights`` are the shares of the teachers that scored the batch, which add up to 1: with several the loss is
    Σ w_i D_i. ``heads`` holds the output layers of scorers whose full vocabulary is compared.
    """
    term = config.terms[source]
    if term.divergence == "cross_entropy":
        loss = TokenLoss(-batch.plain_logprobs)
    elif term.divergence == "k1":
        loss = policy_gradient(batch, weights, config.advantage, config.importance)
    else:
        loss = _over_teachers(batch, weights, heads, lambda *of: _divergence(batch, term, *of))
    if source == "student":
        ratio, metrics = importance_weights(batch, config.importance)
        loss = TokenLoss(loss.values if ratio is None else loss.values * ratio, loss.metrics | metrics)
    if term.divergence == "k1" and term.entropy_gate is not None:  # unweighted: it does not depend on the sampled token
        loss = _plus(loss, _over_teachers(batch, weights, heads, lambda *of: _gated_alone(batch, term, *of)))
    return loss


def reference_loss(batch: TokenBatch, config: AnchorConfig, head: Head | None = None) -> torch.Tensor:
    """KL(π_θ‖π_ref) of each token's distribution, or its k2 or k3, [N] nats. RunError without reference scores."""
    scored = batch.reference
    if scored is None:
        raise RunError("the KL to the reference needs the reference's scores, but the batch has none")
    if config.needs_student_samples:
        return (k2 if config.estimator == "k2" else k3)(batch.logprobs, scored.logprobs)
    support = "full" if config.estimator == "full" else "teacher_top_k"
    return diverge("reverse_kl", compare(batch, scored, support, config.tail, head))


def _divergence(batch: TokenBatch, term: TermConfig, scored: ScoredTokens, head: Head | None) -> TokenLoss:
    if term.divergence == "k2":
        return TokenLoss(k2(batch.logprobs, scored.logprobs))
    if term.divergence == "k3":
        return TokenLoss(k3(batch.logprobs, scored.logprobs))
    outcomes = compare(batch, scored, term.support, term.tail, head)
    loss = TokenLoss(diverge(term.divergence, outcomes, term.beta), {"entropy_gap": _entropy_gap(outcomes)})
    return loss if term.entropy_gate is None else _plus(loss, _gated(outcomes, term))


def _gated_alone(batch: TokenBatch, term: TermConfig, scored: ScoredTokens, head: Head | None) -> TokenLoss:
    """What the gate adds to a loss that does not compare distributions itself."""
    outcomes = compare(batch, scored, term.support, term.tail, head)
    return _plus(_gated(outcomes, term), TokenLoss(torch.zeros(()), {"entropy_gap": _entropy_gap(outcomes)}))


def _gated(outcomes: Outcomes, term: TermConfig) -> TokenLoss:
    """coef · 1[H(teacher) > gate] · KL(π_T‖π_θ): covers the teacher's alternatives where it has several
    (EOPD, arXiv 2603.07079). The entropy is that of the outcomes that are compared."""
    gate = (entropy(outcomes, outcomes.log_q) > term.entropy_gate).float()
    return TokenLoss(term.entropy_gate_coef * gate * forward_kl(outcomes), {"entropy_gate_share": gate})


def _plus(loss: TokenLoss, more: TokenLoss) -> TokenLoss:
    return TokenLoss(loss.values + more.values, loss.metrics | more.metrics)


@torch.no_grad()
def _entropy_gap(outcomes: Outcomes) -> torch.Tensor:
    """H(student) − H(teacher) on the outcomes, [N] nats (Rethinking OPD, arXiv 2604.13016)."""
    return entropy(outcomes, outcomes.log_p) - entropy(outcomes, outcomes.log_q)


def _over_teachers(
    batch: TokenBatch,
    weights: Mapping[str, float],
    heads: Mapping[str, Head],
    loss_of: Callable[[ScoredTokens, Head | None], TokenLoss],
) -> TokenLoss:
    """Σ w_i D_i over the teachers that scored the batch; RunError without any."""
    if not batch.teachers:
        raise RunError("the loss compares with a teacher, but the batch has no teacher's scores")
    losses = {name: loss_of(scored, heads.get(name)) for name, scored in batch.teachers.items()}
    if len(losses) == 1:
        return next(iter(losses.values()))
    values = sum(weights[name] * loss.values for name, loss in losses.items())
    logged = next(iter(losses.values())).metrics
    metrics = {key: sum(weights[name] * loss.metrics[key] for name, loss in losses.items()) for key in logged}
    return TokenLoss(values, metrics)
