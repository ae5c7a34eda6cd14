"""The policy gradient and its importance weights against float64 references written from the definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config import AdvantageConfig, LossConfig
from opd_ray.learn.losses import TokenBatch, TokenLoss
from opd_ray.learn.losses.advantage import advantages, discounted, log_ratios
from opd_ray.learn.losses.diagnostics import student_metrics, topk_overlap
from opd_ray.learn.losses.terms import source_loss
from token_batches import N, V, batch, gradient_of, scored

ONE = {"teacher": 1.0}
MANY = 64
ZEROS = torch.zeros(MANY)


def policy_gradient(tokens: TokenBatch, **changes: Any) -> TokenLoss:
    return source_loss(tokens, "student", LossConfig(student={"divergence": "k1"}, **changes), ONE, {})


class Numbers:
    """What the definitions speak of, float64 of a batch."""

    def __init__(self, tokens: TokenBatch) -> None:
        logits = tokens.logits.detach().double().numpy()
        self.p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        self.chosen = tokens.tokens.numpy()
        self.log_p = np.log(self.p[np.arange(len(self.p)), self.chosen])
        self.teacher = tokens.teachers["teacher"].logprobs.double().numpy()
        self.reference = tokens.reference.logprobs.double().numpy()
        self.mu = tokens.behaviour_logprobs.double().numpy()
        self.ratio = np.exp(self.log_p - self.mu)

    def gradient(self, per_token: np.ndarray) -> np.ndarray:
        """Of Σ per_token · log π_θ(y): per_token · (onehot − p)."""
        return (np.eye(V)[self.chosen] - self.p) * per_token[:, None]


def spread_batch() -> TokenBatch:
    return batch(scale=0.5, n=MANY)


def assert_loss(loss: TokenLoss, tokens: TokenBatch, values: np.ndarray, gradient: np.ndarray) -> None:
    np.testing.assert_allclose(loss.values.detach(), values, atol=5e-6)
    np.testing.assert_allclose(gradient_of(loss.values, tokens.logits), gradient, atol=5e-6)


def test_without_correction_it_is_reinforce_with_the_teachers_log_ratio() -> None:
    tokens = spread_batch()
    x = Numbers(tokens)
    advantage = x.teacher - x.log_p
    assert_loss(policy_gradient(tokens), tokens, -advantage * x.log_p, x.gradient(-advantage))


def test_its_mean_gradient_is_that_of_the_reverse_kl() -> None:
    """E_π[−A ∇log π] = ∇KL(π‖π_T): enumerate the vocabulary."""
    logits, teacher = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    every = torch.arange(V)
    scores = {"teacher": scored(teacher.expand(V, V), every, 2)}
    spread = TokenBatch(every, torch.zeros(V), scores, logits=logits.expand(V, V))
    p = logits.softmax(-1)
    exact = (p * (logits.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    mean = (p.detach() * policy_gradient(spread).values).sum()
    torch.testing.assert_close(gradient_of(mean, logits), gradient_of(exact, logits))


def test_ratio_is_the_importance_weighted_surrogate() -> None:
    tokens = spread_batch()
    x = Numbers(tokens)
    advantage = x.teacher - x.log_p
    loss = policy_gradient(tokens, importance={"correction": "ratio"})
    assert_loss(loss, tokens, -x.ratio * advantage, x.gradient(-x.ratio * advantage))


def test_clip_is_ppos_minimum() -> None:
    tokens, clip = spread_batch(), 0.3
    x = Numbers(tokens)
    advantage = x.teacher - x.log_p
    loss = policy_gradient(tokens, importance={"correction": "clip", "clip_ratio": clip})
    values = -np.minimum(x.ratio * advantage, np.clip(x.ratio, 1 - clip, 1 + clip) * advantage)
    active = ~(((advantage > 0) & (x.ratio > 1 + clip)) | ((advantage < 0) & (x.ratio < 1 - clip)))
    assert 0 < active.sum() < MANY
    assert_loss(loss, tokens, values, x.gradient(-x.ratio * advantage * active))
    np.testing.assert_allclose(loss.metrics["clip_fraction"], ~active)


def test_truncate_and_mask_weigh_the_policy_gradient_without_being_differentiated() -> None:
    tokens = spread_batch()
    x = Numbers(tokens)
    advantage = x.teacher - x.log_p
    capped = np.minimum(x.ratio, 1.2)
    loss = policy_gradient(tokens, importance={"correction": "truncate", "cap": 1.2})
    assert_loss(loss, tokens, -capped * advantage * x.log_p, x.gradient(-capped * advantage))
    np.testing.assert_allclose(loss.metrics["capped_share"], x.ratio > 1.2)
    inside = (x.ratio >= 0.7) & (x.ratio <= 1.2)
    assert 0 < inside.sum() < MANY
    loss = policy_gradient(tokens, importance={"correction": "mask", "mask_low": 0.7, "mask_high": 1.2})
    weight = x.ratio * inside
    assert_loss(loss, tokens, -weight * advantage * x.log_p, x.gradient(-weight * advantage))
    np.testing.assert_allclose(loss.metrics["masked_share"], ~inside)


@pytest.mark.parametrize("divergence", ["k2", "k3"])
def test_truncate_and_mask_weigh_estimators_per_token(divergence: str) -> None:
    tokens = spread_batch()
    ratio = torch.from_numpy(Numbers(tokens).ratio).float()
    plain = source_loss(tokens, "student", LossConfig(student={"divergence": divergence}), ONE, {}).values
    for importance, weight in (
        ({"correction": "truncate", "cap": 1.2}, ratio.clamp(max=1.2)),
        ({"correction": "mask", "mask_low": 0.7, "mask_high": 1.2}, ratio * ((ratio >= 0.7) & (ratio <= 1.2))),
    ):
        config = LossConfig(student={"divergence": divergence}, importance=importance)
        values = source_loss(tokens, "student", config, ONE, {}).values
        torch.testing.assert_close(values, plain * weight)
        torch.testing.assert_close(
            gradient_of(values, tokens.logits), gradient_of(plain * weight, tokens.logits), atol=1e-6, rtol=1e-5
        )


def test_the_entropy_gate_of_a_policy_gradient_keeps_its_weight() -> None:
    """The bug: the weight of the sampled token multiplied the forward KL of the gate, which does not depend on it."""
    tokens = spread_batch()
    student = {"divergence": "k1", "entropy_gate": 0.0}
    masked = {"correction": "mask", "mask_low": 0.7, "mask_high": 1.2}

    def values(**sections) -> torch.Tensor:
        return source_loss(tokens, "student", LossConfig(**sections), ONE, {}).values

    gate = values(student=student) - values(student={"divergence": "k1"})
    weighted = values(student=student, importance=masked) - values(student={"divergence": "k1"}, importance=masked)
    assert (gate.abs() > 0.01).any()
    torch.testing.assert_close(weighted, gate, atol=1e-5, rtol=1e-4)


def test_every_part_of_the_advantage_stands_where_the_formula_has_it() -> None:
    tokens = dataclasses.replace(spread_batch(), reward_advantages=torch.linspace(-2, 2, MANY))
    x = Numbers(tokens)
    config = AdvantageConfig(teacher_coef=1.5, reward_coef=0.25, extrapolation=1.5, clip=0.8)
    advantage, metrics = advantages(tokens, ONE, config)
    raw = 1.5 * (x.teacher - x.log_p) + 0.5 * (x.teacher - x.reference)
    expected = np.clip(raw, -0.8, 0.8) + 0.25 * np.linspace(-2, 2, MANY)
    np.testing.assert_allclose(advantage, expected, atol=5e-6)
    np.testing.assert_allclose(metrics["advantage_clip_fraction"], np.abs(raw) > 0.8)
    assert not advantage.requires_grad


def test_exopd_extrapolates_the_log_ratio_to_the_reference() -> None:
    """λ (log π_T − log π_ref) − (log π − log π_ref), as ExOPD writes it."""
    tokens = spread_batch()
    x = Numbers(tokens)
    advantage, _ = advantages(tokens, ONE, AdvantageConfig(extrapolation=1.25))
    np.testing.assert_allclose(advantage, 1.25 * (x.teacher - x.reference) - (x.log_p - x.reference), atol=5e-6)


def test_a_proximal_teacher_is_mixed_with_the_student_and_bounds_the_log_ratio() -> None:
    """TOP-D: log(α ρ + 1 − α), before its weight, its clip and what is added to it."""
    tokens = spread_batch()
    teacher = dataclasses.replace(tokens.teachers["teacher"], logprobs=tokens.teachers["teacher"].logprobs - 100)
    x, alpha = Numbers(tokens), 0.2
    expected = 1.5 * np.log(alpha * np.exp(x.teacher - x.log_p) + 1 - alpha) - 0.5
    advantage, _ = advantages(tokens, ONE, AdvantageConfig(proximal=alpha, teacher_coef=1.5, constant=-0.5))
    np.testing.assert_allclose(advantage, expected, atol=5e-6)
    loss = policy_gradient(tokens, advantage={"proximal": alpha, "teacher_coef": 1.5, "constant": -0.5})
    assert_loss(loss, tokens, -expected * x.log_p, x.gradient(-expected))
    never = dataclasses.replace(tokens, teachers={"teacher": teacher})
    np.testing.assert_allclose(
        advantages(never, ONE, AdvantageConfig(proximal=alpha))[0], math.log(1 - alpha), rtol=1e-5
    )


@pytest.mark.parametrize("outliers", ["mask", "forward_kl"])
def test_what_the_teacher_would_not_accept_counts_less(outliers: str) -> None:
    """TrOPD's mean over its coin: P · k1 + (1 − P) · KL(π_T‖π_θ) with P = min(π_T/π_θ, 1); a mask has the first."""
    tokens = dataclasses.replace(spread_batch(), reward_advantages=torch.linspace(-2, 2, MANY))
    x = Numbers(tokens)
    trust = np.minimum(np.exp(x.teacher - x.log_p), 1)
    assert 0.2 < (trust < 1).mean() < 0.8
    used = trust * (x.teacher - x.log_p) + 0.25 * np.linspace(-2, 2, MANY)
    assert (trust * (x.teacher - x.log_p)).min() >= -1 / math.e - 1e-6
    values, gradient = -used * x.log_p, x.gradient(-used)
    if outliers == "forward_kl":
        q = tokens.teachers["teacher"].hidden.double().softmax(-1).numpy()
        values = values + (1 - trust) * (q * (np.log(q) - np.log(x.p))).sum(-1)
        gradient = gradient + (1 - trust)[:, None] * (x.p - q)
    student = {"divergence": "k1", "outliers": outliers, "top_k": V}
    config = LossConfig(student=student, advantage={"reward_coef": 0.25})
    loss = source_loss(tokens, "student", config, ONE, {})
    assert_loss(loss, tokens, values, gradient)
    np.testing.assert_allclose(loss.metrics["trust"], trust, rtol=1e-5)


def test_what_the_teacher_rules_out_has_no_trust_and_no_advantage() -> None:
    """The bug: P log P was 0 · −∞, and the step was lost."""
    tokens = spread_batch()
    teacher = dataclasses.replace(tokens.teachers["teacher"], logprobs=torch.full((MANY,), -torch.inf))
    never = dataclasses.replace(tokens, teachers={"teacher": teacher})
    advantage, metrics = advantages(never, ONE, AdvantageConfig(constant=-0.5), only_trusted=True)
    assert (advantage == -0.5).all() and (metrics["trust"] == 0).all()


def test_a_constant_advantage_needs_no_teacher() -> None:
    """OPSA: what was sampled becomes less likely."""
    tokens = dataclasses.replace(spread_batch(), teachers={}, reference=None)
    log_p = tokens.logprobs.detach().double().numpy()
    p = tokens.logits.detach().double().softmax(-1).numpy()
    loss = policy_gradient(tokens, advantage={"teacher_coef": 0.0, "constant": -0.5})
    assert_loss(loss, tokens, 0.5 * log_p, 0.5 * (np.eye(V)[tokens.tokens.numpy()] - p))


def test_the_reward_alone_is_grpo_and_needs_no_teacher() -> None:
    rewards = torch.linspace(-2, 2, MANY)
    tokens = dataclasses.replace(spread_batch(), reward_advantages=rewards)
    x = Numbers(tokens)
    bare = dataclasses.replace(tokens, teachers={}, reference=None)
    loss = policy_gradient(
        bare,
        advantage={"teacher_coef": 0.0, "reward_coef": 1.0},
        importance={"correction": "clip", "clip_ratio": 0.2},
    )
    a = rewards.double().numpy()
    np.testing.assert_allclose(
        loss.values.detach(), -np.minimum(x.ratio * a, np.clip(x.ratio, 0.8, 1.2) * a), atol=5e-6
    )


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), discount=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_reward_to_go_is_what_a_loop_adds_up(lengths: list[int], discount: float, seed: int) -> None:
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    expected = []
    for row in values.double().split(lengths):
        for t in range(len(row)):
            expected.append(sum(discount ** (u - t) * row[u].item() for u in range(t, len(row))))
    np.testing.assert_allclose(discounted(values, torch.tensor(lengths), discount), expected, atol=1e-5)


def test_no_tokens_have_no_reward_to_go() -> None:
    assert discounted(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0).shape == (0,)


def test_log_ratios_without_a_teacher_are_zero() -> None:
    tokens = dataclasses.replace(batch(), teachers={}, reference=None)
    assert not log_ratios(tokens, torch.randn(N), {}, AdvantageConfig(teacher_coef=0, reward_coef=1)).any()


def test_a_token_the_behaviour_policy_never_sampled_gives_a_finite_loss() -> None:
    tokens = dataclasses.replace(batch(), behaviour_logprobs=torch.full((N,), -1e4))
    for correction in ("ratio", "clip", "truncate", "mask"):
        values = policy_gradient(tokens, importance={"correction": correction}).values
        assert torch.isfinite(values).all() and torch.isfinite(gradient_of(values, tokens.logits)).all()


def test_student_metrics_are_what_they_are_called() -> None:
    tokens = dataclasses.replace(spread_batch(), stop_token_ids=(3,))
    teacher = dataclasses.replace(
        tokens.teachers["teacher"], stop_logprobs=tokens.teachers["teacher"].hidden.log_softmax(-1)[:, 3]
    )
    tokens = dataclasses.replace(tokens, teachers={"teacher": teacher})
    x = Numbers(tokens)
    repetitive = (torch.arange(MANY) % 3 == 0).float()
    ends, cuts = (torch.arange(MANY) == 10).float(), (torch.arange(MANY) == 20).float()
    metrics = student_metrics(tokens.detached(), ONE, repetitive, ends, cuts)
    assert all(value.shape == (MANY,) for value in metrics.values())
    np.testing.assert_allclose(metrics["advantage"], x.teacher - x.log_p, atol=5e-6)
    np.testing.assert_allclose(metrics["importance_ratio"], x.ratio, rtol=1e-5)
    np.testing.assert_allclose(metrics["off_policy_kl"], x.ratio - 1 - np.log(x.ratio), atol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], -(x.p * np.log(x.p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(metrics["eos_student_end"].sum(), x.p[10, 3], rtol=1e-5)
    np.testing.assert_allclose(metrics["eos_student_cut"].sum(), x.p[20, 3], rtol=1e-5)
    np.testing.assert_allclose(metrics["eos_teacher_end"].sum(), teacher.stop_logprobs[10].exp(), rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher_logprob_repetitive"].sum(), x.teacher[::3].sum(), rtol=1e-5)


def test_metrics_cut_no_gradient_of_terms_that_share_the_batch() -> None:
    """Regression: metrics under no_grad cached the log-probs and cut the next term's gradient silently."""
    tokens = spread_batch()
    metrics = student_metrics(tokens.detached(), ONE, ZEROS, ZEROS, ZEROS)
    assert not any(value.requires_grad for value in metrics.values())
    assert policy_gradient(tokens).values.requires_grad


def test_the_overlap_counts_shared_ids_of_the_top_k() -> None:
    tokens = batch(k=4, stop_ids=(3, 7, 5))
    overlap = topk_overlap(tokens.detached(), ONE)
    logits = tokens.logits.detach().clone()
    logits[:, 3] = logits[:, [3, 7, 5]].logsumexp(-1)
    logits[:, [7, 5]] = -torch.inf
    for n in range(N):
        shared = set(logits[n].topk(4).indices.tolist()) & set(tokens.teachers["teacher"].topk_ids[n].tolist())
        assert overlap[n].item() == pytest.approx(len(shared) / 4)
