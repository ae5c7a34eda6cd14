"""Divergences against float64 references written from the definitions, values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config import LossConfig, ReferenceTermConfig
from opd_ray.errors import RunError
from opd_ray.learn import losses
from opd_ray.learn.losses import ScoredTokens, TokenBatch, vocabulary
from opd_ray.learn.losses.divergences import diverge, entropy, forward_kl, jsd, reverse_kl
from opd_ray.learn.losses.support import Outcomes, compare
from opd_ray.learn.losses.terms import reference_loss, source_loss
from token_batches import N, V, batch, gradient_of, identity, scored

NAMES = ("reverse_kl", "forward_kl", "jsd")
TOP_K = ("teacher_top_k", "student_top_k")
TAILS = ("bucket", "renormalise", "stop_gradient")
BETA = 0.3
STOPS = (3, 7, 5)
ONE = {"teacher": 1.0}


def loss_of(tokens: TokenBatch, **term) -> torch.Tensor:
    """[N] of the student's term with these fields."""
    config = LossConfig(student={"coef": 1.0, "beta": BETA} | term)
    return source_loss(tokens, "student", config, ONE, {"teacher": identity}).values


def definition(p: torch.Tensor, q: torch.Tensor, name: str, beta: float) -> torch.Tensor:
    """The divergence of two vectors of probabilities, straight from its formula."""
    if name == "reverse_kl":
        return (p * (p / q).log()).sum()
    if name == "forward_kl":
        return (q * (q / p).log()).sum()
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def expected_of(
    logits: torch.Tensor, log_q: torch.Tensor, support: list[int], tail: str, name: str, beta: float = BETA
) -> tuple[float, torch.Tensor]:
    """(value, gradient [V]) for one token in float64; ``log_q`` is over the whole vocabulary [V]."""
    logits = logits.detach().double().requires_grad_()
    p, q = logits.softmax(-1), log_q.double().exp()
    inside = torch.tensor(support)
    p_in, q_in = p[inside], q[inside]
    if len(support) == len(logits):
        value = definition(p_in, q_in, name, beta)
    elif tail == "bucket":
        outside = torch.tensor([i for i in range(len(logits)) if i not in support])
        p_all, q_all = (torch.cat((part[inside], part[outside].sum()[None])) for part in (p, q))
        value = definition(p_all, q_all, name, beta)
    elif tail == "renormalise":
        value = definition(p_in / p_in.sum(), q_in / q_in.sum(), name, beta)
    else:
        weight = {
            "reverse_kl": (p_in / q_in).log(),
            "forward_kl": -q_in / p_in,
            "jsd": (1 - beta) * (p_in / (beta * q_in + (1 - beta) * p_in)).log(),
        }[name].detach()
        # ∂p_i/∂z_v = p_i (1[i = v] − p_v), summed over i in S with its weight held constant.
        gradient = -p.detach() * (p_in.detach() * weight).sum()
        gradient[inside] += p_in.detach() * weight
        return definition(p_in, q_in, name, beta).item(), gradient
    value.backward()
    return value.item(), logits.grad


def supports(tokens: TokenBatch, support: str) -> list[list[int]]:
    if support == "full":
        return [list(range(tokens.vocab_size))] * len(tokens.tokens)
    ids = tokens.teachers["teacher"].topk_ids if support == "teacher_top_k" else tokens.given_ids
    return ids.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("support", "tail", "k"),
    [(support, tail, k) for support in TOP_K for tail in TAILS for k in (2, 5, V - 1)] + [("full", "bucket", 2)],
)
def test_every_divergence_matches_its_definition(name: str, support: str, tail: str, k: int) -> None:
    tokens = batch(k=k)
    values = loss_of(tokens, divergence=name, support=support, top_k=k, tail=tail)
    gradient = gradient_of(values, tokens.logits)
    log_q = tokens.teachers["teacher"].hidden.double().log_softmax(-1)
    for n, ids in enumerate(supports(tokens, support)):
        value, expected = expected_of(tokens.logits[n], log_q[n], ids, tail, name)
        # A tail of one unlikely token is what float32 log-probs of the others leave: a few digits of it.
        tolerance = 1e-3 if k == V - 1 else 1e-5
        assert values[n].item() == pytest.approx(value, abs=5e-6, rel=tolerance)
        torch.testing.assert_close(gradient[n].double(), expected, atol=5e-6, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", TOP_K)
def test_top_k_of_the_whole_vocabulary_equals_the_full_one(name: str, tail: str, support: str) -> None:
    tokens = batch(k=V + 5, scale=4.0)
    values = loss_of(tokens, divergence=name, support=support, tail=tail)
    full = loss_of(tokens, divergence=name, support="full", tail=tail)
    torch.testing.assert_close(values, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient_of(values, tokens.logits), gradient_of(full, tokens.logits), atol=1e-5, rtol=1e-5
    )


def test_the_normalizer_in_blocks_is_logsumexp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "block_rows", lambda logits: 3)
    tokens = batch(scale=30.0)
    expected, weights = tokens.logits.logsumexp(-1), torch.arange(float(N))
    torch.testing.assert_close(tokens.log_normalizer, expected, atol=0, rtol=0)
    found = gradient_of(tokens.log_normalizer * weights, tokens.logits)
    torch.testing.assert_close(found, gradient_of(expected * weights, tokens.logits))


@pytest.mark.parametrize("stop_ids", [(), STOPS])
@pytest.mark.parametrize("more", [-3, 0, 3])
def test_the_reverse_kl_on_the_vocabulary_is_that_on_its_outcomes(
    monkeypatch: pytest.MonkeyPatch, more: int, stop_ids: tuple[int, ...]
) -> None:
    """In blocks of two tokens, with a frozen model of another vocabulary, and with the entropies of both."""
    monkeypatch.setattr(vocabulary, "block_rows", lambda logits: 2)
    monkeypatch.setattr(vocabulary, "_FEWEST_ROWS", 5)
    tokens = batch(stop_ids=stop_ids)
    hidden = torch.randn(N, V + more, generator=torch.Generator().manual_seed(5)) * 2
    outcomes = compare(tokens, ScoredTokens(tokens.behaviour_logprobs, hidden=hidden), "full", "bucket", identity)
    found = vocabulary.reverse_kl(tokens.logits, hidden, identity, tokens.stop_token_ids)
    expected = reverse_kl(outcomes), entropy(outcomes, outcomes.log_p), entropy(outcomes, outcomes.log_q)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    slope = gradient_of(expected[0], tokens.logits)
    torch.testing.assert_close(gradient_of(found[0], tokens.logits), slope, atol=5e-6, rtol=1e-5)
    assert not found[1].requires_grad and not found[2].requires_grad


def test_tokens_that_neither_model_can_say_are_no_part_of_the_reverse_kl() -> None:
    """Models that mask the padding of their vocabulary with -inf: 0 times infinity was no number."""
    torch.manual_seed(0)
    logits, theirs = torch.randn(3, 9), torch.randn(3, 9)
    expected = vocabulary.reverse_kl(logits[:, :7].requires_grad_(), theirs[:, :7].clone(), lambda states: states, ())
    masked = torch.cat([logits.detach()[:, :7], torch.full((3, 2), -torch.inf)], 1).requires_grad_()
    theirs[:, 7:] = -torch.inf
    found = vocabulary.reverse_kl(masked, theirs, lambda states: states, ())
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    found[0].sum().backward()
    assert torch.isfinite(masked.grad).all() and (masked.grad[:, 7:] == 0).all()


def test_jsd_tends_to_forward_and_reverse_kl() -> None:
    """JSD/β → KL(q‖p) for β → 0 and JSD/(1 − β) → KL(p‖q) for β → 1, in float64 where the limits resolve."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(N, V, generator=generator).double().log_softmax(-1) for _ in range(2))
    outcomes = Outcomes(log_p, log_q)
    torch.testing.assert_close(jsd(outcomes, 1e-6) / 1e-6, forward_kl(outcomes), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(jsd(outcomes, 1 - 1e-6) / 1e-6, reverse_kl(outcomes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 4, V])
@pytest.mark.parametrize(
    ("name", "tail"), [(name, tail) for name in NAMES for tail in TAILS if (name, tail) != ("forward_kl", TAILS[2])]
)
def test_teacher_equal_to_student_gives_no_gradient(name: str, tail: str, k: int) -> None:
    tokens = batch()
    own = scored(tokens.logits.detach(), tokens.tokens, k)
    tokens = dataclasses.replace(tokens, teachers={"teacher": own})
    values = loss_of(tokens, divergence=name, tail=tail)
    torch.testing.assert_close(values.detach(), torch.zeros(N), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_of(values, tokens.logits), torch.zeros(N, V), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(2, 20),
    scale=st.floats(0.01, 5.0),
    name=st.sampled_from(NAMES),
    support=st.sampled_from(TOP_K),
)
def test_the_tail_bucket_bounds_the_full_divergence_from_below(
    seed: int, k: int, scale: float, name: str, support: str
) -> None:
    """Merging outcomes never raises a divergence, and a softmax's gradient cannot push all logits the same way.

    A small tail is 1 minus a sum of float32 probabilities, which leaves few digits of its mass: hence the tolerances.
    """
    tokens = batch(seed=seed, k=k, scale=scale, v=20)
    values = loss_of(tokens, divergence=name, support=support, tail="bucket")
    full = loss_of(tokens, divergence=name, support="full").detach()
    assert (values >= -1e-5).all()
    assert (values <= full + 3e-3 * (1 + full)).all()
    assert gradient_of(values, tokens.logits).sum(-1).abs().max() < 1e-3 * (1 + full.max())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(2, 20),
    scale=st.floats(5.0, 100.0),
    name=st.sampled_from(NAMES),
    tail=st.sampled_from(TAILS),
    support=st.sampled_from([*TOP_K, "full"]),
)
def test_sharp_distributions_keep_values_and_gradients_finite(
    seed: int, k: int, scale: float, name: str, tail: str, support: str
) -> None:
    tokens = batch(seed=seed, k=k, scale=scale, v=20)
    values = loss_of(tokens, divergence=name, support=support, tail=tail)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient_of(values, tokens.logits)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("student_peak", "teacher_peak"), [(200.0, 0.0), (0.0, 200.0), (200.0, 200.0)])
def test_an_empty_tail_stays_finite_on_either_side(name: str, student_peak: float, teacher_peak: float) -> None:
    """A distribution whose top-k holds all the mass has a tail of exactly 0 in float32."""
    logits, teacher, chosen = torch.zeros(1, V), torch.zeros(1, V), torch.zeros(1, dtype=torch.int64)
    logits[0, :2], teacher[0, :2] = student_peak, teacher_peak
    scores = {"teacher": scored(teacher, chosen, 2)}
    tokens = TokenBatch(chosen, torch.zeros(1), scores, logits=logits.requires_grad_())
    values = loss_of(tokens, divergence=name, tail="bucket")
    assert torch.isfinite(values).all() and torch.isfinite(gradient_of(values, logits)).all()


def test_a_truncated_sum_that_rounds_above_one_is_no_negative_tail() -> None:
    tokens = batch(k=V - 1)
    sound = tokens.teachers["teacher"]
    inflated = sound.topk_logprobs - sound.topk_logprobs.logsumexp(-1, keepdim=True) + 3e-7
    scores = dataclasses.replace(sound, topk_logprobs=inflated)
    assert torch.isfinite(loss_of(dataclasses.replace(tokens, teachers={"teacher": scores}))).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [2, 4])
def test_ids_that_the_student_lacks_count_as_tail(name: str, k: int) -> None:
    """Qwen2.5 pads its 1.5B and 7B checkpoints to 151 936 and 152 064 ids: the gather must not run off the end."""
    tokens = batch()
    teacher = torch.randn(N, V + 3, generator=torch.Generator().manual_seed(5)) * 2
    teacher[::2, V] = 9.0
    scores = scored(teacher, tokens.tokens, k)
    tokens = dataclasses.replace(tokens, teachers={"teacher": scores})
    values = loss_of(tokens, divergence=name, tail="bucket")
    gradient = gradient_of(values, tokens.logits)
    for n in range(N):
        known = [id_ for id_ in scores.topk_ids[n].tolist() if id_ < V]
        log_q = teacher[n].double().log_softmax(-1)
        rest = (1 - log_q[known].exp().sum()).log()
        # All that lies outside is one outcome, however it is spread: put q's rest on the first id outside.
        spread = torch.full((V,), -1e3, dtype=torch.float64)
        spread[known] = log_q[known]
        spread[next(i for i in range(V) if i not in known)] = rest
        value, expected = expected_of(tokens.logits[n], spread, known, "bucket", name)
        assert values[n].item() == pytest.approx(value, abs=5e-6)
        torch.testing.assert_close(gradient[n].double(), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [V, V + 2, V + 3])
def test_a_support_as_wide_as_the_vocabulary_may_lack_ids_of_the_student(name: str, k: int) -> None:
    """The bug: k ≥ V ids counted as all of the student's, though some were padding ids of a larger vocabulary: the mass
    of the student's ids that they displaced was in no outcome (.1295 where .2002 is exact)."""
    tokens = batch()
    teacher = torch.randn(N, V + 3, generator=torch.Generator().manual_seed(5)) * 2
    teacher[::2, V:] = -9.0  # these rows hold every id of the student from k = V on, the others lack one at least
    teacher[1::2, V] = 4.0
    scores = scored(teacher, tokens.tokens, k)
    values = loss_of(dataclasses.replace(tokens, teachers={"teacher": scores}), divergence=name, tail="bucket")
    gradient = gradient_of(values, tokens.logits)
    for n in range(N):
        known = [id_ for id_ in scores.topk_ids[n].tolist() if id_ < V]
        log_q = teacher[n].double().log_softmax(-1)
        if len(known) < V:
            spread = torch.full((V,), -1e3, dtype=torch.float64)
            spread[known] = log_q[known]
            spread[next(i for i in range(V) if i not in known)] = (1 - log_q[known].exp().sum()).log()
            log_q = spread
        value, expected = expected_of(tokens.logits[n], log_q[:V], known, "bucket", name)
        assert values[n].item() == pytest.approx(value, abs=2e-5, rel=1e-3)
        torch.testing.assert_close(gradient[n].double(), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("more", [-3, 3])
def test_padding_ids_of_the_larger_vocabulary_are_left_out_of_the_full_one(more: int) -> None:
    tokens = batch()
    teacher = torch.randn(N, V + more, generator=torch.Generator().manual_seed(5)) * 2
    scores = {"teacher": scored(teacher, tokens.tokens % (V + more), 4)}
    values = loss_of(dataclasses.replace(tokens, teachers=scores), support="full")
    size = min(V, V + more)
    p, q = (logits[:, :size].double().softmax(-1) for logits in (tokens.logits.detach(), teacher))
    torch.testing.assert_close(values.double(), (p * (p / q).log()).sum(-1), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("support", "tail", "k"),
    [(support, tail, k) for support in TOP_K for tail in TAILS for k in (3, V)] + [("full", "bucket", 2)],
)
def test_the_eos_set_is_one_outcome_for_both_models(name: str, support: str, tail: str, k: int) -> None:
    """Against float64 over the vocabulary in which the set's members are really merged."""
    for seed in range(4):
        tokens = batch(seed=seed, k=k, stop_ids=STOPS)
        values = loss_of(tokens, divergence=name, support=support, tail=tail)
        gradient = gradient_of(values, tokens.logits)
        log_q = tokens.teachers["teacher"].hidden.double().log_softmax(-1)
        others = [i for i in range(V) if i not in STOPS]
        outcome = {id_: 0 if id_ in STOPS else 1 + others.index(id_) for id_ in range(V)}
        for n, ids in enumerate(supports(tokens, support)):
            logits = tokens.logits[n].detach().double().requires_grad_()
            merged = torch.cat((logits[list(STOPS)].logsumexp(-1)[None], logits[others]))
            merged_q = torch.cat((log_q[n, list(STOPS)].logsumexp(-1)[None], log_q[n, others]))
            value, slope = expected_of(merged, merged_q, sorted({outcome[i] for i in ids}), tail, name)
            merged.backward(slope)
            assert values[n].item() == pytest.approx(value, abs=5e-6)
            torch.testing.assert_close(gradient[n].double(), logits.grad, atol=5e-6, rtol=1e-5)


def test_an_eos_sampled_under_one_id_is_scored_as_the_set() -> None:
    tokens = batch(stop_ids=STOPS)
    tokens = dataclasses.replace(tokens, tokens=torch.tensor([3, 5, 7, 0, 1, 2, 5]))
    p = tokens.logits.detach().double().softmax(-1)
    together = p[:, list(STOPS)].sum(-1).log()
    alone = p.gather(-1, tokens.tokens[:, None]).squeeze(-1).log()
    stops = torch.tensor([True, True, True, False, False, False, True])
    torch.testing.assert_close(tokens.logprobs.double(), torch.where(stops, together, alone), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tokens.plain_logprobs.double(), alone, atol=1e-6, rtol=1e-5)


def test_one_eos_id_changes_nothing() -> None:
    tokens = batch()
    same = dataclasses.replace(tokens, stop_token_ids=(3,))
    for term in ({"divergence": name, "support": s} for name in NAMES for s in (*TOP_K, "full")):
        assert torch.equal(loss_of(tokens, **term), loss_of(same, **term))


@pytest.mark.parametrize("divergence", ["reverse_kl", "k1"])
def test_the_entropy_gate_adds_the_forward_kl_where_the_teacher_hesitates(divergence: str) -> None:
    tokens = batch(k=4)
    own = loss_of(tokens, divergence=divergence)
    log_q = compare(tokens, tokens.teachers["teacher"], "teacher_top_k", "bucket", None).log_q.double()
    entropies = -(log_q.exp() * log_q).sum(-1)
    gate = float(entropies.median())
    config = LossConfig(student={"divergence": divergence, "entropy_gate": gate, "entropy_gate_coef": 0.5})
    gated = source_loss(tokens, "student", config, ONE, {})
    hesitates = (entropies > gate).float()
    assert 0 < hesitates.sum() < N
    torch.testing.assert_close(gated.values, own + 0.5 * hesitates * loss_of(tokens, divergence="forward_kl"))
    torch.testing.assert_close(gated.metrics["entropy_gate_share"], hesitates)
    assert "entropy_gap" in gated.metrics


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_sampled_estimators_match_their_definitions(name: str) -> None:
    tokens = batch(scale=1.0)
    values = loss_of(tokens, divergence=name)
    logits = tokens.logits.detach().double().requires_grad_()
    own = logits.log_softmax(-1).gather(-1, tokens.tokens[:, None]).squeeze(-1)
    log_r = tokens.teachers["teacher"].logprobs.double() - own
    expected = log_r.square() / 2 if name == "k2" else log_r.exp() - 1 - log_r
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient_of(values, tokens.logits).double(), gradient_of(expected, logits), atol=1e-5, rtol=1e-5
    )


def test_k2_has_the_gradient_of_the_reverse_kl_and_k3_its_value() -> None:
    """In the mean over the student's own distribution: enumerate the vocabulary."""
    logits, teacher = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    every = torch.arange(V)
    scores = {"teacher": scored(teacher.expand(V, V), every, V)}
    spread = TokenBatch(every, torch.zeros(V), scores, logits=logits.expand(V, V))
    p = logits.softmax(-1)
    exact = (p * (logits.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    torch.testing.assert_close((p * loss_of(spread, divergence="k3")).sum(), exact)
    mean_k2 = (p.detach() * loss_of(spread, divergence="k2")).sum()
    torch.testing.assert_close(gradient_of(mean_k2, logits), gradient_of(exact, logits))


@pytest.mark.parametrize(("name", "divergence"), [("k2", reverse_kl), ("k3", forward_kl)])
def test_the_divergence_that_an_estimator_descends(name: str, divergence: Callable[..., torch.Tensor]) -> None:
    """The bug: k3 was the only estimator of the KL to the reference, as if it descended KL(π_θ‖π_ref); its mean
    gradient, over all tokens by enumeration, is that of KL(π_ref‖π_θ). That of k2 is the reverse KL's."""
    logits, other = torch.randn(2, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    logits.requires_grad_()
    every = torch.arange(V)
    log_q = other.log_softmax(-1)
    reference = ScoredTokens(log_q, every[:, None], log_q[:, None])
    spread = TokenBatch(every, torch.zeros(V), reference=reference, logits=logits.expand(V, V))
    p = logits.softmax(-1).detach()
    mean = (p * reference_loss(spread, ReferenceTermConfig(estimator=name))).sum()
    exact = divergence(Outcomes(logits.log_softmax(-1), log_q)).sum()
    torch.testing.assert_close(gradient_of(mean, logits), gradient_of(exact, logits), atol=1e-14, rtol=1e-12)


def test_several_teachers_are_averaged_by_their_shares() -> None:
    tokens, other = batch(seed=0, k=4), batch(seed=1, k=4).teachers["teacher"]
    both = dataclasses.replace(tokens, teachers={"teacher": tokens.teachers["teacher"], "other": other})
    alone = dataclasses.replace(tokens, teachers={"teacher": other})
    for divergence in (*NAMES, "k2", "k3"):
        config = LossConfig(student={"divergence": divergence})
        values = source_loss(both, "student", config, {"teacher": 0.75, "other": 0.25}, {}).values
        expected = 0.75 * loss_of(tokens, divergence=divergence, beta=0.5)
        expected = expected + 0.25 * loss_of(alone, divergence=divergence, beta=0.5)
        torch.testing.assert_close(values, expected)


def test_cross_entropy_is_of_the_very_token() -> None:
    tokens = dataclasses.replace(batch(stop_ids=STOPS), tokens=torch.tensor([3, 5, 7, 0, 1, 2, 5]))
    values = source_loss(tokens, "golden", LossConfig(), {}, {}).values
    torch.testing.assert_close(
        values, torch.nn.functional.cross_entropy(tokens.logits, tokens.tokens, reduction="none")
    )


def test_the_reference_loss_is_the_reverse_kl_to_it() -> None:
    tokens = batch(k=4)
    as_teacher = dataclasses.replace(tokens, teachers={"teacher": tokens.reference})
    for tail in TAILS:
        loss = reference_loss(tokens, ReferenceTermConfig(estimator="top_k", tail=tail))
        torch.testing.assert_close(loss, loss_of(as_teacher, tail=tail))
    torch.testing.assert_close(
        reference_loss(tokens, ReferenceTermConfig(estimator="full"), identity), loss_of(as_teacher, support="full")
    )
    for name in ("k2", "k3"):
        loss = reference_loss(tokens, ReferenceTermConfig(estimator=name))
        torch.testing.assert_close(loss, loss_of(as_teacher, divergence=name))


def test_missing_scores_are_refused_by_name() -> None:
    tokens = batch()
    bare = ScoredTokens(tokens.behaviour_logprobs)
    bare = dataclasses.replace(tokens, teachers={"teacher": bare}, reference=None)
    for support, missing in (("teacher_top_k", "top-k"), ("student_top_k", "given ids"), ("full", "hidden states")):
        with pytest.raises(RunError, match=missing):
            loss_of(bare, support=support)
    with pytest.raises(RunError, match="reference"):
        reference_loss(bare, ReferenceTermConfig())


def test_a_probability_of_zero_costs_only_where_the_divergence_says_so() -> None:
    """q = 0 leaves KL(q‖p) finite; p·log(p/q) is infinite, and said to be."""
    log_p = torch.zeros(1, 3).log_softmax(-1).requires_grad_()
    outcomes = Outcomes(log_p, torch.tensor([[0.5, 0.5, 0.0]]).log())
    for name in ("forward_kl", "jsd"):
        value = diverge(name, outcomes)
        assert torch.isfinite(value).all() and torch.isfinite(gradient_of(value, log_p)).all()
    assert torch.isinf(diverge("reverse_kl", outcomes)).all()
