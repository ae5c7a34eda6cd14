"""Losses against float64 references written from the definitions, values and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config import LossConfig
from opd_ray.losses import ScoredTokens, TokenBatch, make_loss
from opd_ray.losses.anchors import reference_kl, sft_cross_entropy
from opd_ray.losses.policy_gradient import PolicyGradient
from opd_ray.losses.reduction import token_weights
from opd_ray.losses.reverse_kl import ReverseKL, bucketed_reverse_kl

N, V = 7, 11


def scored(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> ScoredTokens:
    """What a scorer with these logits [N, V] returns."""
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(min(k, logits.shape[-1]), -1)
    sampled = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return ScoredTokens(sampled.float(), top.indices, top.values.float())


def batch(seed: int = 0, k: int = V, scale: float = 2.0, n: int = N, v: int = V) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, reference, behaviour = (torch.randn(n, v, generator=generator) * scale for _ in range(4))
    tokens = torch.randint(0, v, (n,), generator=generator)
    mu = behaviour.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return TokenBatch(student.requires_grad_(), tokens, mu, scored(teacher, tokens, k), scored(reference, tokens, k))


def reference_reverse_kl(logits: np.ndarray, scores: ScoredTokens) -> tuple[np.ndarray, np.ndarray]:
    """(values [N], gradient of their sum [N, V]) of the bucketed reverse KL, float64, from its definition."""
    p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    values, gradient = np.zeros(len(p)), np.zeros_like(p)
    for n, support in enumerate(scores.topk_ids.numpy()):
        log_q = scores.topk_logprobs[n].double().numpy()
        log_ratio = np.full(p.shape[1], np.nan)
        log_ratio[support] = np.log(p[n, support]) - log_q
        outside = np.setdiff1d(np.arange(p.shape[1]), support)
        if len(outside):
            log_ratio[outside] = np.log(p[n, outside].sum()) - np.log1p(-np.exp(log_q).sum())
        values[n] = (p[n] * log_ratio).sum()
        # d KL / d logit_v = p_v (log-ratio of v's bucket − KL): the "+1" terms cancel over a whole simplex.
        gradient[n] = p[n] * (log_ratio - values[n])
    return values, gradient


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_reverse_kl_matches_its_definition_in_value_and_gradient(k: int) -> None:
    tokens = batch(k=k)
    loss = ReverseKL()(tokens)
    loss.values.sum().backward()
    values, gradient = reference_reverse_kl(tokens.logits.detach().double().numpy(), tokens.teacher)
    np.testing.assert_allclose(loss.values.detach(), values, atol=2e-6)
    np.testing.assert_allclose(tokens.logits.grad, gradient, atol=2e-6)


def test_full_support_equals_the_exact_kl() -> None:
    tokens = batch(k=V + 5)
    order = tokens.teacher.topk_ids.argsort(-1)
    log_q = tokens.teacher.topk_logprobs.gather(-1, order)
    log_p = tokens.logits.detach().log_softmax(-1)
    exact = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ReverseKL()(tokens).values.detach(), exact)


@pytest.mark.parametrize("k", [1, 4, V])
def test_teacher_equal_to_student_gives_zero_loss_and_zero_gradient(k: int) -> None:
    tokens = batch()
    same = TokenBatch(
        tokens.logits, tokens.tokens, tokens.behaviour_logprobs, scored(tokens.logits.detach(), tokens.tokens, k), None
    )
    loss = ReverseKL()(same)
    loss.values.sum().backward()
    torch.testing.assert_close(loss.values.detach(), torch.zeros(N), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.logits.grad, torch.zeros(N, V), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.metrics["advantage"], torch.zeros(N), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), scale=st.floats(0.01, 5.0))
def test_the_tail_bucket_bounds_the_exact_kl_from_below(seed: int, k: int, scale: float) -> None:
    """Merging outcomes never raises a divergence."""
    tokens = batch(seed=seed, k=k, scale=scale, v=20)
    exact = batch(seed=seed, k=20, scale=scale, v=20)
    values = bucketed_reverse_kl(tokens, tokens.teacher)
    values.sum().backward()
    full = bucketed_reverse_kl(exact, exact.teacher).detach()
    assert (values >= -1e-5).all()
    assert (values <= full + 1e-4 * (1 + full)).all()
    # A softmax's gradient cannot push all logits the same way.
    assert tokens.logits.grad.sum(-1).abs().max() < 1e-4 * (1 + full.max())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), scale=st.floats(5.0, 100.0))
def test_sharp_distributions_keep_values_and_gradients_finite(seed: int, k: int, scale: float) -> None:
    tokens = batch(seed=seed, k=k, scale=scale, v=20)
    values = bucketed_reverse_kl(tokens, tokens.teacher)
    values.sum().backward()
    assert torch.isfinite(values).all() and (values >= -1e-4).all()
    assert torch.isfinite(tokens.logits.grad).all()


@pytest.mark.parametrize(("student_peak", "teacher_peak"), [(200.0, 0.0), (0.0, 200.0), (200.0, 200.0)])
def test_an_empty_tail_stays_finite_on_either_side(student_peak: float, teacher_peak: float) -> None:
    """A distribution whose top-k holds all the mass has a tail of exactly 0 in float32."""
    logits = torch.zeros(1, V)
    logits[0, :2] = student_peak
    teacher = torch.zeros(1, V)
    teacher[0, :2] = teacher_peak
    chosen = torch.zeros(1, dtype=torch.int64)
    tokens = TokenBatch(logits.requires_grad_(), chosen, torch.zeros(1), scored(teacher, chosen, 2), None)
    values = bucketed_reverse_kl(tokens, tokens.teacher)
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(logits.grad).all()


def test_a_truncated_sum_that_rounds_above_one_is_no_negative_tail() -> None:
    tokens = batch(k=V - 1)
    inflated = tokens.teacher.topk_logprobs - tokens.teacher.topk_logprobs.logsumexp(-1, keepdim=True) + 3e-7
    scores = ScoredTokens(tokens.teacher.logprobs, tokens.teacher.topk_ids, inflated)
    assert torch.isfinite(bucketed_reverse_kl(tokens, scores)).all()


@pytest.mark.parametrize("k", [1, 4, V + 3])
def test_ids_that_the_student_lacks_count_as_tail(k: int) -> None:
    """Qwen2.5 pads its 1.5B and 7B checkpoints to 151 936 and 152 064 ids: the gather must not run off the end."""
    tokens = batch()
    teacher = torch.randn(N, V + 3, generator=torch.Generator().manual_seed(5)) * 2
    teacher[::2, V] = 9.0
    scores = scored(teacher, tokens.tokens, k)
    values = bucketed_reverse_kl(tokens, scores)
    values.sum().backward()
    logits = tokens.logits.detach().double().numpy()
    for n in range(N):
        known = scores.topk_ids[n] < V
        known_scores = ScoredTokens(
            scores.logprobs[n : n + 1], scores.topk_ids[n, known][None], scores.topk_logprobs[n, known][None]
        )
        expected, gradient = reference_reverse_kl(logits[n : n + 1], known_scores)
        np.testing.assert_allclose(values[n].item(), expected[0], atol=3e-6)
        np.testing.assert_allclose(tokens.logits.grad[n], gradient[0], atol=3e-6)


def test_policy_gradient_matches_its_definition_in_value_and_gradient() -> None:
    clip = 0.2
    tokens = batch(scale=0.5, n=64)
    loss = PolicyGradient(clip)(tokens)
    loss.values.sum().backward()
    logits = tokens.logits.detach().double().numpy()
    p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    rows, chosen = np.arange(64), tokens.tokens.numpy()
    log_p = np.log(p[rows, chosen])
    advantage = tokens.teacher.logprobs.double().numpy() - log_p
    ratio = np.exp(log_p - tokens.behaviour_logprobs.double().numpy())
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)
    # Inside the band, or where the plain term is the smaller one, d(−ρA)/dlogit = −ρA (onehot − p); else 0.
    active = ~(((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip)))
    gradient = (np.eye(V)[chosen] - p) * (-ratio * advantage * active)[:, None]
    assert 0 < active.sum() < 64
    np.testing.assert_allclose(loss.values.detach(), expected, atol=5e-6)
    np.testing.assert_allclose(tokens.logits.grad, gradient, atol=5e-6)
    np.testing.assert_allclose(loss.metrics["clip_fraction"], ~active)
    np.testing.assert_allclose(loss.metrics["importance_ratio"], ratio, rtol=1e-5)


def test_on_policy_the_policy_gradient_is_reinforce_with_the_teachers_log_ratio() -> None:
    tokens = batch()
    own = tokens.logits.detach().log_softmax(-1).gather(-1, tokens.tokens[:, None]).squeeze(-1)
    loss = PolicyGradient(0.2)(TokenBatch(tokens.logits, tokens.tokens, own, tokens.teacher, None))
    torch.testing.assert_close(loss.values.detach(), -(tokens.teacher.logprobs - own))
    assert loss.metrics["clip_fraction"].sum() == 0
    torch.testing.assert_close(loss.metrics["off_policy_kl"], torch.zeros(N), atol=1e-6, rtol=0)


def test_a_token_the_behaviour_policy_never_sampled_gives_a_finite_loss() -> None:
    tokens = batch()
    never = torch.full((N,), -1e4)
    loss = PolicyGradient(0.2)(TokenBatch(tokens.logits, tokens.tokens, never, tokens.teacher, None))
    loss.values.sum().backward()
    assert torch.isfinite(loss.values).all() and torch.isfinite(tokens.logits.grad).all()


def test_entropy_metric_is_the_students() -> None:
    tokens = batch()
    expected = torch.distributions.Categorical(logits=tokens.logits.detach()).entropy()
    torch.testing.assert_close(ReverseKL()(tokens).metrics["entropy"], expected)


def test_metrics_carry_no_gradient_and_terms_sharing_a_batch_keep_theirs() -> None:
    """Regression: metrics under no_grad cached the log-probs and cut the next term's gradient silently."""
    tokens = batch()
    losses = [
        make_loss(LossConfig(opd="reverse_kl"))(tokens),
        make_loss(LossConfig(opd="policy_gradient"))(tokens),
        reference_kl(tokens, "k3"),
        sft_cross_entropy(tokens),
    ]
    for loss in losses:
        assert loss.values.requires_grad
        assert all(metric.shape == (N,) and not metric.requires_grad for metric in loss.metrics.values())


def test_sft_is_cross_entropy() -> None:
    tokens = batch()
    expected = torch.nn.functional.cross_entropy(tokens.logits, tokens.tokens, reduction="none")
    torch.testing.assert_close(sft_cross_entropy(tokens).values, expected)


def test_k3_matches_its_definition_and_is_unbiased() -> None:
    tokens = batch(scale=1.0)
    loss = reference_kl(tokens, "k3")
    own = tokens.logits.log_softmax(-1).gather(-1, tokens.tokens[:, None]).squeeze(-1)
    ratio = (tokens.reference.logprobs - own).exp()
    torch.testing.assert_close(loss.values, ratio - 1 - ratio.log(), atol=1e-5, rtol=1e-5)
    # Its mean over the student's own distribution is KL(π_θ‖π_ref): enumerate the vocabulary.
    logits, reference = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    every = torch.arange(V)
    spread = TokenBatch(logits.expand(V, V), every, torch.zeros(V), None, scored(reference.expand(V, V), every, V))
    p = logits.softmax(-1)
    expected = (p * (logits.log_softmax(-1) - reference.log_softmax(-1))).sum()
    torch.testing.assert_close((p * reference_kl(spread, "k3").values).sum(), expected)


def test_reference_kl_on_the_support_is_the_bucketed_reverse_kl() -> None:
    tokens = batch(k=4)
    torch.testing.assert_close(reference_kl(tokens, "top_k").values, bucketed_reverse_kl(tokens, tokens.reference))


def test_missing_scores_are_refused_by_name() -> None:
    tokens = batch()
    bare = TokenBatch(tokens.logits, tokens.tokens, tokens.behaviour_logprobs, None, None)
    for name in ("reverse_kl", "policy_gradient"):
        with pytest.raises(ValueError, match="teacher"):
            make_loss(LossConfig(opd=name))(bare)
    with pytest.raises(ValueError, match="reference"):
        reference_kl(bare, "top_k")
    with pytest.raises(ValueError, match="top-k"):
        ReverseKL()(batch(k=0))


def test_both_reductions_equal_hand_computed_numbers() -> None:
    """Rollouts of 1 and 3 tokens with losses 4 | 1 2 3, of a step with 3 rollouts and 8 tokens in all."""
    values, lengths = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([1, 3])
    by_token = token_weights(lengths, num_rollouts=3, num_tokens=8, reduction="token")
    by_sequence = token_weights(lengths, num_rollouts=3, num_tokens=8, reduction="sequence")
    assert math.isclose((values * by_token).sum(), 10 / 8, rel_tol=1e-6)
    assert math.isclose((values * by_sequence).sum(), (4 + 2) / 3, rel_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), cut=st.integers(1, 7), seed=st.integers(0, 99))
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_a_step_split_into_micro_batches_keeps_its_loss(
    lengths: list[int], cut: int, seed: int, reduction: str
) -> None:
    values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    size = (len(lengths), sum(lengths), reduction)
    whole = (values * token_weights(torch.tensor(lengths), *size)).sum()
    cut = min(cut, len(lengths) - 1)
    first, second = torch.tensor(lengths[:cut]), torch.tensor(lengths[cut:])
    head, tail = values[: first.sum()], values[first.sum() :]
    split = (head * token_weights(first, *size)).sum() + (tail * token_weights(second, *size)).sum()
    torch.testing.assert_close(split, whole)


def test_no_tokens_weigh_nothing() -> None:
    for reduction in ("sequence", "token"):
        assert token_weights(torch.zeros(0, dtype=torch.int64), 0, 0, reduction).shape == (0,)
