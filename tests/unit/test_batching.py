"""Plans (which rollout goes where) and collation (which tensor entry belongs to which token)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.buffer.plan import count, group_advantages, plan_step
from opd_ray.errors import RunError
from opd_ray.learn.losses import mapped
from opd_ray.learn.microbatch import MicroBatch, collate, fetch_payloads
from opd_ray.messages import SCORE_SCHEMA, Coefficients, Count, Denominators, Entry, StepPlan
from opd_ray.repetition import repeated_ngrams
from scored_rollouts import Scoring, scored_entries
from small_messages import entry

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 60), st.sampled_from(["student", "golden", "teacher"]))
COEFFICIENTS = Coefficients(1.0, 0.5, 0.25, 0.1)


def entries_of(sizes: list[tuple[int, int, str]]) -> list[Entry]:
    return [
        entry(slot, num_prompt_tokens=prompt, num_response_tokens=response, source=source)
        for slot, (prompt, response, source) in enumerate(sizes)
    ]


@pytest.mark.slow
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
    options = {
        "step": 7,
        "num_ranks": num_ranks,
        "micro_batch_tokens": budget,
        "packing": packing,
        "coefficients": COEFFICIENTS,
    }
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

    counts = {}
    for source in ("student", "golden", "teacher"):
        lengths = [response for _, response, of in sizes if of == source]
        counts[source] = Count(len(lengths), sum(lengths))
    expected = (7, Denominators(**counts), COEFFICIENTS)
    assert all((plan.step, plan.denominators, plan.coefficients) == expected for plan in plans)
    assert plans[0].denominators.tokens == sum(response for _, response, _ in sizes)

    shuffled = random.Random(shuffle_seed).sample(entries, len(entries))
    assert plan_step(shuffled, **options) == plans


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=60), num_ranks=st.integers(1, 8))
def test_ranks_are_balanced_to_within_one_rollout(sizes: list[tuple[int, int, str]], num_ranks: int) -> None:
    plans = plan_step(
        entries_of(sizes),
        step=0,
        num_ranks=num_ranks,
        micro_batch_tokens=200,
        packing=False,
        coefficients=COEFFICIENTS,
    )
    loads = [sum(entry.meta.num_tokens for batch in plan.micro_batches for entry in batch) for plan in plans]
    assert max(loads) - min(loads) <= max(prompt + response for prompt, response, _ in sizes)


def of_payloads(number: int, rows: int, seed: int = 0) -> list[Entry]:
    """Rollouts of lengths with a long tail, ``rows`` to a payload."""
    random_ = random.Random(seed)
    refs = [object() for _ in range(number)]
    return [
        replace(entry(slot, num_response_tokens=min(8192, int(random_.lognormvariate(7, 0.8)))), rollouts=ref)
        for slot, ref in enumerate(ref for ref in refs for _ in range(rows))
    ]


def planned(entries: list[Entry], nodes: Sequence[str], num_ranks: int = 0) -> list[StepPlan]:
    return plan_step(
        entries,
        step=0,
        num_ranks=num_ranks or len(nodes),
        micro_batch_tokens=9000,
        packing=True,
        coefficients=COEFFICIENTS,
        nodes=nodes,
    )


def most_tokens(plans: Sequence[StepPlan]) -> int:
    return max(sum(entry.meta.num_tokens for batch in plan.micro_batches for entry in batch) for plan in plans)


def sent(plans: Sequence[StepPlan], nodes: Sequence[str]) -> int:
    """How often a payload is sent to a node."""
    ranks = zip(plans, nodes, strict=True)
    return len({(node, id(entry.rollouts)) for plan, node in ranks for batch in plan.micro_batches for entry in batch})


@pytest.mark.parametrize("nodes", [["a", "b"] * 2, [*"aaabbbccc"], [*"aab"]])
def test_payloads_stay_together_on_a_node_and_ranks_as_even_as_they_were(nodes: list[str]) -> None:
    """The bug: every node was sent every payload, for one row or two of it."""
    entries = of_payloads(32, 16)
    plans, even = planned(entries, nodes), planned(entries, (), len(nodes))
    assert sent(even, nodes) > 0.9 * 32 * len(set(nodes))
    assert sent(plans, nodes) <= 32 + len(set(nodes)) - 1
    assert most_tokens(plans) <= 1.02 * most_tokens(even)
    placed = [entry.meta.rollout_id for plan in plans for batch in plan.micro_batches for entry in batch]
    assert sorted(placed) == sorted(entry.meta.rollout_id for entry in entries)
    assert planned(random.Random(1).sample(entries, len(entries)), nodes) == plans


def test_a_node_gets_no_more_to_do_for_the_sake_of_payloads() -> None:
    entries = of_payloads(2, 5)
    nodes = ["a", "a", "b", "b"]
    assert planned(entries, nodes) == planned(entries, (), 4)
    assert planned(entries, ["a"] * 4) == planned(entries, (), 4)


def test_a_step_without_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rollout"):
        plan_step([], step=0, num_ranks=1, micro_batch_tokens=10, packing=False, coefficients=COEFFICIENTS)


def whole(entries: list[Entry]) -> StepPlan:
    return StepPlan(0, (tuple(entries),), count(entries), COEFFICIENTS)


def collated(entries: list[Entry], packing: bool) -> MicroBatch:
    return collate(entries, fetch_payloads(whole(entries), lambda refs: refs)[0], packing=packing)


ALL = ("teacher", "reference")
EVERYTHING = Scoring(
    top_k=4,
    given=3,
    hidden=True,
    stop_token_ids=(1, 2),
    roles={"student": ALL, "golden": ("reference",), "teacher": ("math", "reference")},
)


@pytest.mark.parametrize("packing", [False, True])
def test_collation_aligns_every_column_with_its_token(packing: bool) -> None:
    """Checked row by row against the payloads; the student's rows go first whatever the order."""
    entries = scored_entries([(3, 4), (5, 1), (1, 6)], [(2, 3)], [(4, 2)], scoring=EVERYTHING, truncated=[1])
    entries[0] = dataclasses.replace(entries[0], reward_advantage=1.5)
    batch = collated([entries[4], entries[3], *entries[:3]], packing)
    flat_input = batch.input_ids.flatten()
    start = 0
    for rollout in entries:
        row = rollout.rollouts.slice(rollout.row, 1).to_pylist()[0]
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        tokens = slice(start, start + len(response))
        # The input at each gathered position is the token before the one that is predicted.
        assert flat_input[batch.logit_index[tokens]].tolist() == ([prompt[-1], *response])[:-1]
        if packing:
            positions = batch.position_ids.flatten()[batch.logit_index[tokens]].tolist()
            assert positions == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
        segment = next(part for part in batch.segments if rollout.meta.rollout_id in part.rollout_ids)
        assert segment.source == rollout.meta.source
        nth = segment.rollout_ids.index(rollout.meta.rollout_id)
        before = int(segment.lengths[:nth].sum())
        inside, found = slice(before, before + len(response)), segment.tokens
        assert found.tokens[inside].tolist() == response
        assert found.reward_advantages[inside].tolist() == [rollout.reward_advantage] * len(response)
        student = rollout.meta.source == "student"
        if student:
            assert found.behaviour_logprobs[inside].tolist() == row["behaviour_logprobs"]
        else:
            assert found.behaviour_logprobs[inside].isnan().all()
        roles = {**found.teachers, **({"reference": found.reference} if found.reference else {})}
        assert roles.keys() == rollout.scores.keys()
        for role, scored in roles.items():
            score = rollout.scores[role].slice(rollout.row, 1).to_pylist()[0]
            for name in ("logprobs", "topk_ids", "topk_logprobs", "stop_logprobs", "hidden"):
                assert getattr(scored, name)[inside].flatten().tolist() == score[name], name
            if student:
                assert scored.given_logprobs[inside].flatten().tolist() == score["given_logprobs"]
        if student:
            assert found.given_ids[inside].flatten().tolist() == row["topk_ids"]
        start += len(response)
    assert [(part.source, part.lengths.tolist(), part.truncated.tolist()) for part in batch.segments] == [
        ("student", [4, 1, 6], [False, True, False]),
        ("golden", [3], [False]),
        ("teacher", [2], [False]),
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_behind_the_horizon_is_not_trained_on(packing: bool) -> None:
    entries = scored_entries([(3, 4), (5, 1), (1, 6)], scoring=EVERYTHING)
    ahead = [dataclasses.replace(each, meta=dataclasses.replace(each.meta, horizon=3)) for each in entries]
    whole, short = (collated(each, packing) for each in (entries, ahead))
    kept, columns = [0, 1, 2, 4, 5, 6, 7], ([], [])
    for batch, found in zip((whole, short), columns, strict=True):
        (segment,) = batch.segments
        mapped(segment.tokens, lambda column, found=found: found.append(column) or column)
        found.append(batch.input_ids.flatten()[batch.logit_index])
    assert len(columns[1]) > 10
    for every, first in zip(*columns, strict=True):
        np.testing.assert_array_equal(first, every[kept])
    assert short.segments[0].lengths.tolist() == [3, 1, 3]
    assert short.segments[0].truncated.tolist() == [True, False, True]  # none ends with its third token
    assert count(ahead).student == Count(3, 7)


def test_rollouts_of_other_teachers_are_segments_of_their_own() -> None:
    """Hidden states of two models have two widths: they cannot be one tensor."""
    by_first = scored_entries([(3, 4), (5, 2)], scoring=Scoring(hidden=True, hidden_size=8, roles={"student": ALL}))
    routed = Scoring(hidden=True, hidden_size=12, roles={"student": ("code", "reference")})
    by_other = scored_entries([(2, 3)], seed=1, scoring=routed)
    batch = collated([by_first[0], *by_other, by_first[1]], packing=False)
    found = [(name, scored.hidden.shape) for part in batch.segments for name, scored in part.tokens.teachers.items()]
    assert found == [("code", (3, 12)), ("teacher", (6, 8))]


def test_what_a_scorer_was_not_asked_for_is_none() -> None:
    batch = collated(scored_entries([(3, 4)], scoring=Scoring(top_k=0)), packing=False)
    [segment] = batch.segments
    scored = segment.tokens.teachers["teacher"]
    assert scored.topk_ids is scored.topk_logprobs is None
    assert scored.given_logprobs is scored.stop_logprobs is scored.hidden is segment.tokens.given_ids is None


def test_no_rollouts_give_one_dummy_token() -> None:
    batch = collated([], packing=False)
    assert batch.input_ids.shape == (1, 1) and batch.logit_index.shape == (0,) and batch.segments == ()


def rewarded(slot: int, correct: bool, source: str = "student") -> Entry:
    return entry(slot, correct=correct, source=source)


@pytest.mark.parametrize("std", [True, False])
def test_rewards_are_normalised_over_the_responses_to_one_prompt(std: bool) -> None:
    rewards = {0: [True, False, False, False], 1: [True, True], 2: [False, False], 3: [True]}
    entries = [rewarded(slot, correct) for slot, group in rewards.items() for correct in group]
    # Golden rollouts are no responses of the group, whatever their slot.
    found = group_advantages([*entries, rewarded(0, True, "golden")], std)
    spread = np.sqrt(0.25 * 0.75) if std else 1.0
    expected = [0.75 / spread] + [-0.25 / spread] * 3 + [0.0] * 6
    assert [item.reward_advantage for item in found] == pytest.approx(expected)
    assert [item.meta for item in found[:-1]] == [item.meta for item in entries]


def test_a_payload_that_contradicts_its_meta_is_refused() -> None:
    entries = scored_entries([(3, 4), (5, 2)])
    wrong = dataclasses.replace(entries[0], meta=dataclasses.replace(entries[0].meta, num_response_tokens=9))
    with pytest.raises(RunError, match=r"s0-0.*9 response tokens"):
        collated([wrong, entries[1]], packing=False)


@pytest.mark.parametrize("column", ["logprobs", "topk_logprobs", "stop_logprobs", "hidden"])
def test_scores_that_do_not_cover_their_response_are_refused(column: str) -> None:
    entries = scored_entries([(3, 4), (5, 2)], scoring=EVERYTHING)
    rows = entries[1].scores["teacher"].to_pylist()
    rows[entries[1].row][column] = rows[entries[1].row][column][:-1]
    short = pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA)
    entries[1] = dataclasses.replace(entries[1], scores=entries[1].scores | {"teacher": short})
    with pytest.raises(RunError, match=r"rollout s1-0.*teacher"):
        collated(entries, packing=False)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=5), n=st.integers(1, 4))
def test_repeated_ngrams_are_those_a_loop_finds(rows: list[list[int]], n: int) -> None:
    expected = []
    for row in rows:
        grams = [tuple(row[end - n + 1 : end + 1]) if end >= n - 1 else None for end in range(len(row))]
        expected += [float(gram is not None and gram in grams[:end]) for end, gram in enumerate(grams)]
    flat = np.array([token for row in rows for token in row])
    assert repeated_ngrams(flat, np.array([len(row) for row in rows]), n).tolist() == expected
