"""The policy gradient: a detached advantage on the sampled token, and what corrects for older weights.

    A = clip(R_t, ±c) + α · reward,   R_t = Σ_{u ≥ t} γ^(u−t) r_u
    r = κ (log π_T − log π) + (λ − 1)(log π_T − log π_ref)            detached

with κ = teacher_coef, α = reward_coef, λ = extrapolation (ExOPD, arXiv 2602.12125) and γ = discount (0: R = r; MiniLLM,
arXiv 2306.08543: 1). κ = 1 alone is OPD (METHOD §1), α alone GRPO. π is the student that is trained now, or the one
that sampled; of the latter only the log-prob of the very token is known, so an EOS set is not summed in it. The clip
bounds what comes from the models and not the reward, which is bounded by itself.

With ρ = π_θ(y)/μ(y) of the very token, importance.correction gives the loss

    none      −A log π_θ
    ratio     −ρ A
    clip      −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)         PPO, arXiv 1707.06347
    truncate  −min(ρ, cap) A log π_θ                     weight detached
    mask      −ρ·1[low ≤ ρ ≤ high] A log π_θ             weight detached; MOPD, arXiv 2601.02780
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opd_ray.config import AdvantageConfig, ImportanceConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import MAX_LOG_RATIO, ScoredTokens, TokenBatch, TokenLoss, Tokens


def policy_gradient(
    batch: TokenBatch, weights: Mapping[str, float], config: AdvantageConfig, importance: ImportanceConfig
) -> TokenLoss:
    """−A log π_θ with its correction; ``weights`` are the teachers' shares by name, which add up to 1."""
    advantage, metrics = advantages(batch, weights, config)
    if importance.correction in ("ratio", "clip"):
        ratio = log_importance_ratio(batch).exp()
        values = ratio * advantage
        if importance.correction == "clip":
            epsilon = importance.clip_ratio
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
            metrics["clip_fraction"] = (clipped < values).float().detach()
            values = torch.minimum(values, clipped)
    else:
        values = advantage * batch.logprobs
    return TokenLoss(-values, metrics)


def advantages(
    batch: TokenBatch, weights: Mapping[str, float], config: AdvantageConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(A [N], metrics), detached."""
    metrics: dict[str, torch.Tensor] = {}
    advantage = batch.teacher_advantages
    if advantage is None:
        advantage = log_ratios(batch, batch.logprobs.detach(), weights, config)
    if config.clip is not None:
        metrics["advantage_clip_fraction"] = (advantage.abs() > config.clip).float()
        advantage = advantage.clamp(-config.clip, config.clip)
    if config.reward_coef > 0 and batch.reward_advantages is not None:
        advantage = advantage + config.reward_coef * batch.reward_advantages
    metrics["advantage_used"] = advantage
    return advantage, metrics


def log_ratios(
    tokens: Tokens, policy: torch.Tensor, weights: Mapping[str, float], config: AdvantageConfig
) -> torch.Tensor:
    """r of each token, [N], with ``policy`` its log π [N]; 0 without a teacher. RunError without a needed reference."""
    if not config.uses_teacher:
        return torch.zeros_like(policy)
    teacher = combined_logprobs(tokens.teachers, weights)
    ratios = config.teacher_coef * (teacher - policy)
    if config.extrapolation != 1:
        if tokens.reference is None:
            raise RunError("advantage.extrapolation needs the reference's log-probs, but the scores have none")
        ratios = ratios + (config.extrapolation - 1) * (teacher - tokens.reference.logprobs)
    return ratios


def discounted(values: torch.Tensor, lengths: torch.Tensor, discount: float) -> torch.Tensor:
    """R_t = Σ_{u ≥ t} γ^(u−t) values_u within each of the packed rows of ``lengths`` [rows]; [N] like ``values``."""
    if discount == 0 or values.numel() == 0:
        return values
    inside = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    table = torch.zeros(inside.shape, dtype=torch.float64, device=values.device)
    table[inside] = values.double()
    for column in range(table.shape[1] - 2, -1, -1):
        table[:, column] += discount * table[:, column + 1]
    return table[inside].to(values.dtype)


def combined_logprobs(teachers: Mapping[str, ScoredTokens], weights: Mapping[str, float]) -> torch.Tensor:
    """Σ w log π_T(y) over the teachers, [N]."""
    return sum(weights[name] * scored.logprobs for name, scored in teachers.items())


def log_importance_ratio(batch: TokenBatch) -> torch.Tensor:
    """log ρ = log π_θ(y) − log μ(y) of the very token, [N], with gradient; its size counts up to MAX_LOG_RATIO."""
    return (batch.plain_logprobs - batch.behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def importance_weights(
    batch: TokenBatch, config: ImportanceConfig
) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
    """(weight of each token's loss, [N] or 1 for all, metrics) of truncate and mask; detached."""
    if config.correction not in ("truncate", "mask"):
        return 1.0, {}
    ratio = log_importance_ratio(batch).detach().exp()
    if config.correction == "truncate":
        return ratio.clamp(max=config.cap), {"capped_share": (ratio > config.cap).float()}
    inside = ((ratio >= config.mask_low) & (ratio <= config.mask_high)).float()
    return ratio * inside, {"masked_share": 1.0 - inside}
