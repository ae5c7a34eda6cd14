"""Plans (which rollout goes where) and collation (which tensor entry belongs to which token)."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from factories import entry
from opd_ray.batching import MicroBatch, collate, count, plan_step, repeated_ngrams
from opd_ray.config import LearnerConfig, LossConfig
from opd_ray.errors import RunError
from opd_ray.messages import Denominators, Entry, StepPlan
from opd_ray.training import Objective, ResponseLogits, fetch_payloads, finish, lr_factor
from scored_rollouts import VOCABULARY, scored_entries

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 60), st.sampled_from(["student", "golden"]))


def entries_of(sizes: list[tuple[int, int, str]]) -> list[Entry]:
    return [
        entry(slot, num_prompt_tokens=prompt, num_response_tokens=response, source=source)
        for slot, (prompt, response, source) in enumerate(sizes)
    ]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=40),
    num_ranks=st.integers(1, 5),
    budget=st.integers(1, 300),
    packing=st.booleans(),
    shuffle_seed=st.integers(0, 9),
)
def test_plans_hold_every_entry_once_within_budget(
    sizes: list[tuple[int, int, str]], num_ranks: int, budget: int, packing: bool, shuffle_seed: int
) -> None:
    entries = entries_of(sizes)
    options = {"step": 7, "num_ranks": num_ranks, "micro_batch_tokens": budget, "packing": packing}
    plans = plan_step(entries, **options)

    placed = [entry.meta.rollout_id for plan in plans for batch in plan.micro_batches for entry in batch]
    assert sorted(placed) == sorted(entry.meta.rollout_id for entry in entries)
    assert len(plans) == num_ranks
    assert len({len(plan.micro_batches) for plan in plans}) == 1
    assert any(batch for plan in plans for batch in plan.micro_batches[-1:]), "a round in which no rank trains"
    for batch in (batch for plan in plans for batch in plan.micro_batches if batch):
        tokens = [entry.meta.num_tokens for entry in batch]
        cost = sum(tokens) if packing else len(tokens) * max(tokens)
        assert cost <= budget or len(tokens) == 1

    student = [response for _, response, source in sizes if source == "student"]
    golden = [response for _, response, source in sizes if source == "golden"]
    expected = Denominators(len(student), sum(student), len(golden), sum(golden))
    assert all(plan.denominators == expected and plan.step == 7 for plan in plans)

    shuffled = random.Random(shuffle_seed).sample(entries, len(entries))
    assert plan_step(shuffled, **options) == plans


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=60), num_ranks=st.integers(1, 8))
def test_ranks_are_balanced_to_within_one_rollout(sizes: list[tuple[int, int, str]], num_ranks: int) -> None:
    plans = plan_step(entries_of(sizes), step=0, num_ranks=num_ranks, micro_batch_tokens=200, packing=False)
    loads = [sum(entry.meta.num_tokens for batch in plan.micro_batches for entry in batch) for plan in plans]
    assert max(loads) - min(loads) <= max(prompt + response for prompt, response, _ in sizes)


def test_a_step_without_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rollout"):
        plan_step([], step=0, num_ranks=1, micro_batch_tokens=10, packing=False)


def whole(entries: list[Entry]) -> StepPlan:
    return StepPlan(0, (tuple(entries),), count(entries))


def collated(entries: list[Entry], packing: bool) -> MicroBatch:
    return collate(entries, fetch_payloads(whole(entries), lambda refs: refs), packing=packing)


@pytest.mark.parametrize("packing", [False, True])
def test_collation_aligns_every_column_with_its_token(packing: bool) -> None:
    """Checked row by row against the payloads; golden rows go behind student rows whatever the order."""
    entries = scored_entries([(3, 4), (5, 1), (1, 6)], [(2, 3)], top_k=4)
    batch = collated([entries[3], *entries[:3]], packing)
    flat_input = batch.input_ids.flatten()
    start = 0
    for index, rollout in enumerate(entries):
        row = rollout.rollouts.slice(rollout.row, 1).to_pylist()[0]
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        tokens = slice(start, start + len(response))
        assert batch.rollout_ids[index] == rollout.meta.rollout_id
        assert batch.tokens[tokens].tolist() == response
        # The input at each gathered position is the token before the one that is predicted.
        assert flat_input[batch.logit_index[tokens]].tolist() == ([prompt[-1], *response])[:-1]
        if packing:
            positions = batch.position_ids.flatten()[batch.logit_index[tokens]].tolist()
            assert positions == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
        if rollout.meta.source == "student":
            assert batch.behaviour_logprobs[tokens].tolist() == row["behaviour_logprobs"]
            for role, scored in (("teacher", batch.teacher), ("reference", batch.reference)):
                score = rollout.scores[role].slice(rollout.row, 1).to_pylist()[0]
                assert scored.logprobs[tokens].tolist() == score["logprobs"]
                assert scored.topk_ids[tokens].flatten().tolist() == score["topk_ids"]
                assert scored.topk_logprobs[tokens].flatten().tolist() == score["topk_logprobs"]
        start += len(response)
    assert batch.num_student_tokens == 11 and batch.num_student_rollouts == 3
    assert batch.response_lengths.tolist() == [4, 1, 6, 3]


def step_loss(module: ResponseLogits, plans: list[StepPlan], packing: bool, config: LossConfig):
    """(loss, gradient of every parameter, metrics) of one step, summed over ranks and micro-batches."""
    module.zero_grad()
    objective, sums = Objective(config), {}
    for plan in plans:
        payloads = fetch_payloads(plan, lambda refs: refs)
        for entries in plan.micro_batches:
            batch = collate(entries, payloads, packing=packing)
            logits = module(batch.input_ids, batch.position_ids, batch.logit_index)
            loss, metrics = objective(logits, batch, plan.denominators)
            loss.backward()
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
    return sums["loss"], [parameter.grad.clone() for parameter in module.parameters()], sums


@pytest.fixture(scope="module")
def module(tiny_model: dict[str, Path]) -> ResponseLogits:
    return ResponseLogits(AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32"))


STEP = scored_entries([(3, 9), (8, 2), (5, 14), (1, 1), (6, 6)], [(4, 12), (2, 5)], seed=3)


@pytest.mark.parametrize("opd", ["reverse_kl", "policy_gradient"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(
    ("num_ranks", "budget", "packing"), [(1, 4096, True), (1, 30, False), (1, 30, True), (3, 20, False), (9, 1, True)]
)
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(
    module: ResponseLogits, opd: str, reduction: str, num_ranks: int, budget: int, packing: bool
) -> None:
    """Against one padded micro-batch on one rank: packing, accumulation, more ranks than rollouts."""
    config = LossConfig(opd=opd, reduction=reduction, reference_kl_coef=0.1)
    plans = plan_step(STEP, step=0, num_ranks=num_ranks, micro_batch_tokens=budget, packing=packing)
    loss, gradients, metrics = step_loss(module, plans, packing, config)
    expected_loss, expected_gradients, expected_metrics = step_loss(module, [whole(STEP)], False, config)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_response_logits_are_those_of_the_whole_model_row_by_row(
    module: ResponseLogits, tiny_model: dict[str, Path]
) -> None:
    """Right padding needs no mask, and the gather picks position t − 1."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32")
    batch = collated(STEP, packing=False)
    logprobs = module(batch.input_ids, batch.position_ids, batch.logit_index).log_softmax(-1)
    start = 0
    for rollout in STEP:
        row = rollout.rollouts.slice(rollout.row, 1).to_pylist()[0]
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        alone = plain(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = alone[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs[start : start + len(response)], expected, atol=1e-5, rtol=1e-5)
        start += len(response)


def test_the_step_loss_equals_its_definition(module: ResponseLogits) -> None:
    """L = c_opd·mean KL + c_sft·mean CE + β·mean KL_ref with full support, straight from logits."""
    config = LossConfig(opd_coef=0.7, sft_coef=0.4, reference_kl_coef=0.3, reduction="token")
    entries = scored_entries([(3, 5), (2, 4)], [(4, 6)], top_k=VOCABULARY)
    batch = collated(entries, packing=False)
    _, _, metrics = step_loss(module, [whole(entries)], False, config)
    logprobs = module(batch.input_ids, None, batch.logit_index).log_softmax(-1).detach()

    def mean_kl(scored) -> float:
        order = scored.topk_ids.argsort(-1)
        log_q = scored.topk_logprobs.gather(-1, order)
        return (logprobs[:9].exp() * (logprobs[:9] - log_q)).sum(-1).mean().item()

    cross_entropy = -logprobs[9:].gather(-1, batch.tokens[9:, None]).mean().item()
    assert metrics["loss_opd"] == pytest.approx(mean_kl(batch.teacher), abs=1e-5)
    assert metrics["loss_reference_kl"] == pytest.approx(mean_kl(batch.reference), abs=1e-5)
    assert metrics["loss_sft"] == pytest.approx(cross_entropy, abs=1e-5)
    total = 0.7 * metrics["loss_opd"] + 0.4 * metrics["loss_sft"] + 0.3 * metrics["loss_reference_kl"]
    assert metrics["loss"] == pytest.approx(total, abs=1e-6)


def test_a_source_that_the_step_lacks_has_no_metrics(module: ResponseLogits) -> None:
    _, _, metrics = step_loss(module, [whole(STEP[:3])], False, LossConfig())
    assert "loss_opd" in metrics and "loss_sft" not in metrics
    _, _, metrics = step_loss(module, [whole(STEP[5:])], False, LossConfig())
    assert "loss_sft" in metrics and "advantage" not in metrics


def test_a_payload_that_contradicts_its_meta_is_refused() -> None:
    entries = scored_entries([(3, 4), (5, 2)])
    wrong = dataclasses.replace(entries[0], meta=dataclasses.replace(entries[0].meta, num_response_tokens=9))
    with pytest.raises(RunError, match=r"s0-0.*9 response tokens"):
        collated([wrong, entries[1]], packing=False)


def test_scores_missing_for_some_rollouts_are_refused() -> None:
    entries = scored_entries([(3, 4), (5, 2)])
    with pytest.raises(RunError, match="s1-0 carries no teacher scores"):
        collated([entries[0], dataclasses.replace(entries[1], scores={})], packing=False)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=5), n=st.integers(1, 4))
def test_repeated_ngrams_are_those_a_loop_finds(rows: list[list[int]], n: int) -> None:
    expected = []
    for row in rows:
        grams = [tuple(row[end - n + 1 : end + 1]) if end >= n - 1 else None for end in range(len(row))]
        expected += [float(gram is not None and gram in grams[:end]) for end, gram in enumerate(grams)]
    flat = np.array([token for row in rows for token in row])
    assert repeated_ngrams(flat, np.array([len(row) for row in rows]), n).tolist() == expected


def test_the_advantage_is_split_into_repetitive_and_other_tokens() -> None:
    sums = {"advantage": -0.5, "repetitive_share": 0.25, "advantage_repetitive": 0.25}
    assert finish(dict(sums))["advantage_repetitive"] == 1.0
    assert finish(dict(sums))["advantage_other"] == -1.0
    assert "advantage_repetitive" not in finish(sums | {"repetitive_share": 0.0, "advantage_repetitive": 0.0})
    assert finish({"loss_sft": 1.0}) == {"loss_sft": 1.0}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])],
)
def test_learning_rate_rises_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = LearnerConfig(steps=6, warmup_steps=2, lr_schedule=schedule)
    assert [lr_factor(config, step) for step in range(6)] == pytest.approx(expected)


def test_cosine_halves_half_way_and_stays_at_zero_beyond_the_end() -> None:
    config = LearnerConfig(steps=10, lr_schedule="cosine")
    assert [lr_factor(config, step) for step in (0, 5, 10, 20)] == pytest.approx([1, 0.5, 0, 0])
