"""Per-token losses: pure functions of tensors, and the Protocol they share.

A loss returns one value per response token and knows nothing of rollouts, ranks or reductions;
:mod:`opd_ray.losses.reduction` weighs the values with the step's global denominators.
A new loss is a new small file and one line in :func:`make_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from opd_ray.errors import InputError, near

if TYPE_CHECKING:
    from opd_ray.config import LossConfig


@dataclass(frozen=True)
class ScoredTokens:
    """A frozen model's opinion on N tokens; nats, float32, no gradient."""

    logprobs: torch.Tensor
    """[N] log-prob of the token that was sampled."""
    topk_ids: torch.Tensor
    """[N, k] int64; k may be 0."""
    topk_logprobs: torch.Tensor
    """[N, k] under the full softmax."""

    def select(self, mask: torch.Tensor) -> ScoredTokens:
        return ScoredTokens(self.logprobs[mask], self.topk_ids[mask], self.topk_logprobs[mask])


@dataclass(frozen=True)
class TokenBatch:
    """N response tokens of one micro-batch, of one source."""

    logits: torch.Tensor
    """[N, V] float32: the student's logits that predict each token; carries the gradient."""
    tokens: torch.Tensor
    """[N] int64: the tokens that were sampled (or, for golden rollouts, given)."""
    behaviour_logprobs: torch.Tensor
    """[N] float32: log μ(y_t|s_t) of the policy that sampled; nan for golden rollouts."""
    teacher: ScoredTokens | None
    """None for golden rollouts."""
    reference: ScoredTokens | None
    """None for golden rollouts and where no reference is configured."""

    @cached_property
    def log_normalizer(self) -> torch.Tensor:
        """[N] log Σ exp(logits), with gradient; one pass over the vocabulary for every term of the loss."""
        return self.logits.logsumexp(-1)

    @cached_property
    def logprobs(self) -> torch.Tensor:
        """[N] log π_θ(y_t|s_t) of the tokens, with gradient."""
        return self.logits.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1) - self.log_normalizer


@dataclass(frozen=True)
class TokenLoss:
    """One value per token, and per-token quantities worth logging (detached)."""

    values: torch.Tensor
    """[N] float32."""
    metrics: dict[str, torch.Tensor]
    """Name to [N]; averaged over all tokens of the step before they are logged."""


class Loss(Protocol):
    """L_OPD: how far the student is from the teacher on the tokens it sampled."""

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        """The loss of each token; raises ValueError when ``batch.teacher`` lacks what it needs."""


def make_loss(config: LossConfig) -> Loss:
    """The L_OPD that ``loss.opd`` names."""
    if config.opd == "reverse_kl":
        from opd_ray.losses.reverse_kl import ReverseKL

        return ReverseKL()
    if config.opd == "policy_gradient":
        from opd_ray.losses.policy_gradient import PolicyGradient

        return PolicyGradient(config.clip_ratio)
    raise InputError(f"loss.opd '{config.opd}' is unknown{near(config.opd, ['reverse_kl', 'policy_gradient'])}")


_ENTROPY_ROWS = 1024
"""Tokens whose [rows, V] probabilities are held at once for the entropy, which needs no gradient."""


def student_metrics(batch: TokenBatch) -> dict[str, torch.Tensor]:
    """What every L_OPD logs per token, [N] each, detached; ``batch.teacher`` must be there.

    advantage is log π_T − log π_θ of the sampled token, the negative k1 estimate of the reverse KL;
    importance_ratio is π_θ/μ, and off_policy_kl its k3 estimate of KL(μ‖π_θ) (how far the weights moved,
    plus what temperature, top-p and the generator's precision add).
    """
    assert batch.teacher is not None
    # Not under no_grad: that would cache the batch's log-probs without their gradient for the terms that follow.
    logprobs = batch.logprobs.detach()
    log_ratio = (logprobs - batch.behaviour_logprobs).clamp(-20.0, 20.0)
    return {
        "advantage": batch.teacher.logprobs - logprobs,
        "student_logprob": logprobs,
        "teacher_logprob": batch.teacher.logprobs,
        "entropy": _entropy(batch),
        "importance_ratio": log_ratio.exp(),
        "off_policy_kl": torch.expm1(log_ratio) - log_ratio,
    }


def _entropy(batch: TokenBatch) -> torch.Tensor:
    """[N] −Σ p log p of the student, nats: log Z − Σ p · logit."""
    expected = [(logits.softmax(-1) * logits).sum(-1) for logits in batch.logits.detach().split(_ENTROPY_ROWS)]
    return batch.log_normalizer.detach() - torch.cat(expected)
