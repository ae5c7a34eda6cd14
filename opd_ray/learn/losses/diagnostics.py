"""What is logged per token beside the loss (METHOD §2); [N] each, of a batch without gradient.

Names in :data:`RATIOS` are summed over the tokens that they concern and divided by how many these are, which
:func:`finish` does once a step is summed up. A name that begins with an underscore is such a count and is not reported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opd_ray.learn.losses import TokenBatch, block_rows, is_any_of
from opd_ray.learn.losses.advantage import combined_logprobs, log_importance_ratio, spans_of
from opd_ray.learn.losses.support import merged

RATIOS = {
    "advantage_repetitive": "repetitive_share",
    "teacher_logprob_repetitive": "repetitive_share",
    "eos_student_end": "_stopped",
    "eos_student_cut": "_cut",
    "eos_teacher_end": "_stopped",
    "eos_teacher_cut": "_cut",
    "truncated_weight_share": "_weight",
}
"""Metric to the share of tokens (or of weight) that it is a mean over."""


def student_metrics(
    batch: TokenBatch, weights: Mapping[str, float], repetitive: torch.Tensor, ends: torch.Tensor, cuts: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is logged of tokens that the student sampled.

    advantage is log π_T − log π_θ of the sampled token, the negative k1 estimate of the reverse KL (with several
    teachers their weighted mean); importance_ratio is π_θ/μ, and off_policy_kl its k3 estimate of KL(μ‖π_θ) (how far
    the weights moved, plus what temperature, top-p and the generator's precision add). ``ends`` and ``cuts`` [N] are 1
    at the last token of a rollout that stopped, or was cut off. Teacher metrics are there when teachers are;
    unaligned_share, of tokens that are in no span of a teacher with another tokenizer, with such a one.
    ``batch`` is a detached one: what is logged must not become part of the graph.
    """
    logprobs, log_ratio = batch.logprobs, log_importance_ratio(batch)
    metrics = {
        "student_logprob": logprobs,
        "entropy": _entropy(batch),
        "importance_ratio": log_ratio.exp(),
        "off_policy_kl": torch.expm1(log_ratio) - log_ratio,
        "repetitive_share": repetitive,
    }
    if batch.stop_token_ids:
        metrics |= {"_stopped": ends, "_cut": cuts} | _stops("student", batch.stop_logprobs.exp(), ends, cuts)
    if batch.teachers:
        teacher = combined_logprobs(batch.teachers, weights)
        advantage = teacher - logprobs
        metrics |= {
            "advantage": advantage,
            "advantage_repetitive": advantage * repetitive,
            "teacher_logprob": teacher,
            "teacher_logprob_repetitive": teacher * repetitive,
        }
        if (spans := spans_of(batch.teachers)) is not None:
            metrics["unaligned_share"] = (spans < 0).float()
        if all(scored.stop_logprobs is not None for scored in batch.teachers.values()):
            stop = sum(weights[name] * scored.stop_logprobs.exp() for name, scored in batch.teachers.items())
            metrics |= _stops("teacher", stop, ends, cuts)
    return metrics


def _stops(who: str, stop: torch.Tensor, ends: torch.Tensor, cuts: torch.Tensor) -> dict[str, torch.Tensor]:
    """P(stop) [N] where rollouts stopped and where they were cut."""
    return {f"eos_{who}_end": stop * ends, f"eos_{who}_cut": stop * cuts}


def topk_overlap(batch: TokenBatch, weights: Mapping[str, float]) -> torch.Tensor:
    """|S_p ∩ S_q| / k of the student's and each teacher's k most probable tokens, [N] (Rethinking OPD, 2604.13016)."""
    logits = merged(batch.logits, batch.stop_token_ids)
    if batch.merges_stops:
        logits[:, list(batch.stop_token_ids[1:])] = -torch.inf
    overlap = torch.zeros(len(logits), device=logits.device)
    for name, scored in batch.teachers.items():
        k = min(scored.topk_ids.shape[-1], batch.vocab_size)
        ours = logits.topk(k, -1).indices
        # Marked in a [N, V] table of bytes: k² comparisons of each token would be more.
        marked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(-1, ours, True)
        theirs = scored.topk_ids.clamp(max=batch.vocab_size - 1)
        shared = marked.gather(-1, theirs) & (scored.topk_ids < batch.vocab_size)
        if batch.merges_stops:
            shared &= ~is_any_of(theirs, batch.stop_token_ids[1:])
        overlap += weights[name] * shared.sum(-1) / k
    return overlap


def finish(metrics: Mapping[str, float]) -> dict[str, float]:
    """A step's summed metrics as they are reported.

    Those of :data:`RATIOS` become means over the tokens that they concern, and ``advantage_other`` the mean advantage
    over those that are not repetitive (METHOD §2); each is left out where it has no tokens.
    """
    means = {name: value for name, value in metrics.items() if name not in RATIOS and not name.startswith("_")}
    for name, count in RATIOS.items():
        if metrics.get(count, 0.0) > 0 and name in metrics:
            means[name] = metrics[name] / metrics[count]
    if "advantage_repetitive" in metrics and metrics["repetitive_share"] < 1:
        rest = metrics["advantage"] - metrics["advantage_repetitive"]
        means["advantage_other"] = rest / (1 - metrics["repetitive_share"])
    return means


def _entropy(batch: TokenBatch) -> torch.Tensor:
    """[N] −Σ p log p of the student, nats: log Z − Σ p · logit."""
    rows, expected = block_rows(batch.logits), torch.empty_like(batch.log_normalizer)
    for out, block in zip(expected.split(rows), batch.logits.split(rows), strict=True):
        torch.linalg.vecdot(block.softmax(-1), block, out=out)
    return batch.log_normalizer - expected
