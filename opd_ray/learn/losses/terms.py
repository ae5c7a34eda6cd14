"""The loss of one source of rollouts and the KL to the reference, as the configuration asks for them.

:func:`source_loss` is what TermConfig, AdvantageConfig and ImportanceConfig together mean for one batch of tokens;
:func:`reference_loss` is ReferenceTermConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opd_ray.config import LossConfig, ReferenceTermConfig, TermConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import Head, ScoredTokens, TokenBatch, TokenLoss
from opd_ray.learn.losses.advantage import importance_weights, policy_gradient, trust
from opd_ray.learn.losses.divergences import diverge, entropy, forward_kl, k2, k3
from opd_ray.learn.losses.support import compare, states_of
from opd_ray.learn.losses.vocabulary import reverse_kl
from opd_ray.messages import Source

_ESTIMATORS = {"k2": k2, "k3": k3}


def source_loss(
    batch: TokenBatch, source: Source, config: LossConfig, weights: Mapping[str, float], heads: Mapping[str, Head]
) -> TokenLoss:
    """The loss of each token of one source, without its coefficient.

    What looks at the sampled token has the student's importance weights, what compares distributions does not depend
    on that token and has none. ``weights`` are the shares of the teachers that scored the batch, which add up to 1:
    with several the loss is Σ w_i D_i. ``heads`` holds the output layers of scorers whose full vocabulary is compared.
    """
    term = config.terms[source]
    if not batch.teachers and (term.on_distributions or term.divergence in _ESTIMATORS):
        raise RunError("the loss compares with a teacher, but the batch has no teacher's scores")
    values: torch.Tensor | float = 0.0
    metrics: dict[str, torch.Tensor] = {}
    if term.divergence in ("cross_entropy", "k1", *_ESTIMATORS):
        loss = _on_sampled_tokens(batch, term, config, weights)
        weight, metrics = importance_weights(batch, config.importance) if source == "student" else (1.0, {})
        values, metrics = weight * loss.values, loss.metrics | metrics
    if term.on_distributions:
        outlying = 1 - trust(batch, weights) if term.outliers == "forward_kl" else None
        for name, scored in batch.teachers.items():
            loss = _on_distributions(batch, term, scored, heads.get(name), outlying)
            values = values + weights[name] * loss.values
            for key, value in loss.metrics.items():
                metrics[key] = metrics.get(key, 0.0) + weights[name] * value
    return TokenLoss(values, metrics)


def reference_loss(batch: TokenBatch, config: ReferenceTermConfig, head: Head | None = None) -> torch.Tensor:
    """KL(π_θ‖π_ref) of each token's distribution, or its k2 or k3, [N] nats. RunError without reference scores."""
    scored = batch.reference
    if scored is None:
        raise RunError("the KL to the reference needs the reference's scores, but the batch has none")
    if config.needs_student_samples:
        return _ESTIMATORS[config.estimator](batch.logprobs, scored.logprobs)
    if config.estimator == "full":
        return reverse_kl(batch.logits, *states_of(scored, head), batch.stop_token_ids)[0]
    return diverge("reverse_kl", compare(batch, scored, "teacher_top_k", config.tail, head))


def _on_sampled_tokens(
    batch: TokenBatch, term: TermConfig, config: LossConfig, weights: Mapping[str, float]
) -> TokenLoss:
    if term.divergence == "cross_entropy":
        return TokenLoss(-batch.plain_logprobs)
    if term.divergence == "k1":
        only_trusted = term.outliers is not None
        return policy_gradient(batch, weights, config.advantage, config.importance, only_trusted=only_trusted)
    estimate = _ESTIMATORS[term.divergence]
    teachers = batch.teachers.items()
    return TokenLoss(sum(weights[name] * estimate(batch.logprobs, scored.logprobs) for name, scored in teachers))


def _on_distributions(
    batch: TokenBatch, term: TermConfig, scored: ScoredTokens, head: Head | None, outlying: torch.Tensor | None
) -> TokenLoss:
    """The divergence on a support, and what the entropy gate adds to it or to k1: coef · 1[H(teacher) > gate] ·
    KL(π_T‖π_θ), which covers the teacher's alternatives where it has several (EOPD, arXiv 2603.07079); and
    ``outlying`` [N] · KL(π_T‖π_θ), where the loss has that (TrOPD, see :mod:`opd_ray.learn.losses.advantage`).

    Entropies are of the outcomes that are compared; their gap is H(student) − H(teacher) (Rethinking OPD, 2604.13016).
    """
    if term.support == "full" and term.is_plain_reverse_kl:
        values, own, teachers = reverse_kl(batch.logits, *states_of(scored, head), batch.stop_token_ids)
        return TokenLoss(values, {"entropy_gap": own - teachers})
    outcomes = compare(batch, scored, term.support, term.tail, head)
    with torch.no_grad():
        own, teachers = (entropy(outcomes, logprobs) for logprobs in (outcomes.log_p, outcomes.log_q))
    metrics = {"entropy_gap": own - teachers}
    values = 0.0 if term.divergence == "k1" else diverge(term.divergence, outcomes, term.beta)
    if term.entropy_gate is not None:
        metrics["entropy_gate_share"] = gate = (teachers > term.entropy_gate).float()
        values = values + term.entropy_gate_coef * gate * forward_kl(outcomes)
    if outlying is not None:
        values = values + outlying * forward_kl(outcomes)
    return TokenLoss(values, metrics)
