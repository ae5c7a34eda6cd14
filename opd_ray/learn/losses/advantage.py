"""The policy gradient: a detached advantage on the sampled token, and what corrects for older weights.

    A = P · clip(R_t, ±c) + α · reward + b,   R_t = Σ_{u ≥ t} γ^(u−t) r_u
    r = κ (log π_T − log π) + (λ − 1)(log π_T − log π_ref)            detached

with κ = teacher_coef, α = reward_coef, b = constant, λ = extrapolation (ExOPD, arXiv 2602.12125) and γ = discount (0:
R = r; MiniLLM, arXiv 2306.08543: 1). κ = 1 alone is OPD (METHOD §1), α alone GRPO. π is the student that is trained
now, or the one that sampled; of the latter only the log-prob of the very token is known, so an EOS set is not summed in
it. The clip bounds what comes from the models and not the reward, which is bounded by itself. So do, smoothly,

    proximal = a    log π_T − log π becomes log(a ρ + 1 − a) with ρ = π_T/π, at least log(1 − a): the teacher is mixed
                    with the student it should move (TOP-D, arXiv 2607.04751, §3.1; a = .1 to .2). TOP-D also adds the
                    mean of the later tokens' to each and normalises over the responses to a prompt; we do neither.
    outliers        P = min(π_T/π_θ, 1), else 1: P log ρ is never below −1/e (TrOPD, arXiv 2606.01249, which throws a
                    coin M ~ Bernoulli(P) for each token; ours is the mean over M, with the same mean gradient). With
                    forward_kl the loss has (1 − P) KL(π_T‖π_θ) beside it, TrOPD's estimate of outliers, with mask
                    nothing. Its teacher-written prefixes are not here; loss.teacher.* are rollouts that the teacher
                    wrote to the end.
    constant = b    needs no teacher: what was sampled becomes less likely (OPSA, arXiv 2608.31046: −.5 on the .2 of
                    the tokens that are least likely, student.lowest_share). OPSA's own goes on to −1 with the token's
                    entropy among the step's, which no micro-batch knows: not here.

A teacher with another tokenizer has an opinion on spans of text alone (:mod:`opd_ray.score.translation`). A span is
then one action: r is that of the whole span, Σ over its tokens of log π_T − log π, and each token of the span has all
of it, as −r ∇log π(span) = −r Σ ∇log π(y_t) is the gradient of the reverse KL over spans. Not divided among them, as
DPCA (arXiv 2606.09456) divides the teacher's log-prob of a chunk, by what it calls a semantic prior (read in a summary;
the formula is not in the code that its authors gave out). π is the student that sampled: of the one that is trained now
a piece of a micro-batch may hold a part of a span. Tokens of no span have r = 0.

The repeats of a loop that the engine ended have, with loss.loop_advantage = A, that and nothing else, whatever the
divergence: no teacher, who endorses loops, and no reward (:func:`loop_gradient`).

With ρ = π_θ(y)/μ(y) of the very token, importance.correction gives the loss

    none      −A log π_θ
    ratio     −ρ A
    clip      −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)         PPO, arXiv 1707.06347
    truncate  −min(ρ, cap) A log π_θ                     weight detached
    mask      −ρ·1[low ≤ ρ ≤ high] A log π_θ             weight detached; MOPD, arXiv 2601.02780
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from opd_ray.config import AdvantageConfig, ImportanceConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import MAX_LOG_RATIO, ScoredTokens, TokenBatch, TokenLoss, Tokens


def policy_gradient(
    batch: TokenBatch,
    weights: Mapping[str, float],
    config: AdvantageConfig,
    importance: ImportanceConfig,
    *,
    only_trusted: bool = False,
) -> TokenLoss:
    """−A log π_θ with its correction; ``weights`` are the teachers' shares by name, which add up to 1.

    ``only_trusted``: what comes from the models counts by :func:`trust`.
    """
    advantage, metrics = advantages(batch, weights, config, only_trusted=only_trusted)
    if importance.correction in ("ratio", "clip"):
        ratio = log_importance_ratio(batch).exp()
        values = ratio * advantage
        if importance.correction == "clip":
            clipped = _clipped(ratio, advantage, importance.clip_ratio)
            metrics["clip_fraction"] = (clipped < values).float().detach()
            values = clipped
    else:
        values = advantage * batch.logprobs
    return TokenLoss(-values, metrics)


def reward_gradient(batch: TokenBatch, reward_coef: float, clip_ratio: float) -> torch.Tensor:
    """What the reward teaches where evidence leaves a prompt to it, [N]: −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), A = α ·
    the reward within the group, the same for all of a response (equations 2 and 7 of TGOPD, arXiv 2609.02998)."""
    return -_clipped(log_importance_ratio(batch).exp(), reward_coef * batch.reward_advantages, clip_ratio)


def loop_gradient(batch: TokenBatch, advantage: float, clip_ratio: float) -> torch.Tensor:
    """What a token teaches that repeats a loop, [N]: −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), A = ``advantage`` ≤ 0. On
    policy its gradient is −A ∇log π_θ; a token that has become rarer than 1 − ε of what it was is let go.

    A fixed penalty on the very tokens that repeat is a reward in arXiv 2502.03373 (its code: on every token of an
    n-gram that the response held before, through PPO's returns); a fixed negative advantage, whatever a teacher says,
    is OPSA's (arXiv 2608.31046). To spare the first copy, to leave the teacher out on the others, and to do so only
    where the engine found a loop, are ours.
    """
    return -_clipped(log_importance_ratio(batch).exp(), advantage, clip_ratio)


def _clipped(ratio: torch.Tensor, advantage: torch.Tensor | float, epsilon: float) -> torch.Tensor:
    """PPO's surrogate, with gradient."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def advantages(
    batch: TokenBatch, weights: Mapping[str, float], config: AdvantageConfig, *, only_trusted: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(A [N], metrics), detached."""
    metrics: dict[str, torch.Tensor] = {}
    advantage = batch.teacher_advantages
    if advantage is None:
        if spans_of(batch.teachers) is not None:
            raise RunError(
                "a teacher with another tokenizer compares spans, which takes the log-probs that they were sampled "
                "with; set loss.advantage.policy=behaviour"
            )
        advantage = log_ratios(batch, batch.logprobs.detach(), weights, config)
    if config.clip is not None:
        metrics["advantage_clip_fraction"] = (advantage.abs() > config.clip).float()
        advantage = advantage.clamp(-config.clip, config.clip)
    if only_trusted:
        metrics["trust"] = trusted = trust(batch, weights)
        advantage = torch.where(trusted > 0, trusted * advantage, 0.0)  # P log P is 0 where the teacher says never
    if config.reward_coef > 0 and batch.reward_advantages is not None:
        advantage = advantage + config.reward_coef * batch.reward_advantages
    advantage = advantage + config.constant
    metrics["advantage_used"] = advantage
    return advantage, metrics


def log_ratios(
    tokens: Tokens, policy: torch.Tensor, weights: Mapping[str, float], config: AdvantageConfig
) -> torch.Tensor:
    """r of each token, [N], with ``policy`` its log π [N]; 0 without a teacher. RunError without a needed reference."""
    if not config.uses_teacher:
        return torch.zeros_like(policy)
    teacher, spans = combined_logprobs(tokens.teachers, weights), spans_of(tokens.teachers)
    ratios = over_spans(teacher - policy, spans)
    if config.proximal is not None:
        ratios = torch.logaddexp(ratios + math.log(config.proximal), ratios.new_tensor(math.log1p(-config.proximal)))
    ratios = config.teacher_coef * ratios
    if config.extrapolation != 1:
        if tokens.reference is None:
            raise RunError("advantage.extrapolation needs the reference's log-probs, but the scores have none")
        ratios = ratios + (config.extrapolation - 1) * over_spans(teacher - tokens.reference.logprobs, spans)
    return ratios


def spans_of(teachers: Mapping[str, ScoredTokens]) -> torch.Tensor | None:
    """The spans [N] of the teacher with another tokenizer, who is then the only one; None without such."""
    return next((scored.spans for scored in teachers.values() if scored.spans is not None), None)


def over_spans(values: torch.Tensor, spans: torch.Tensor | None) -> torch.Tensor:
    """[N] the sum of ``values`` [N] over each token's span, 0 for a token of none; as they are without ``spans``."""
    if spans is None:
        return values
    inside = spans >= 0
    sums = values.new_zeros(1 + int(spans.max().clamp(min=0))).index_add(0, spans[inside], values[inside])
    return torch.where(inside, sums[spans.clamp(min=0)], 0.0)


def trust(batch: TokenBatch, weights: Mapping[str, float]) -> torch.Tensor:
    """min(π_T/π_θ, 1) of the sampled token, [N], detached: with which speculative decoding would accept it."""
    return (combined_logprobs(batch.teachers, weights) - batch.logprobs.detach()).clamp(max=0.0).exp()


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
