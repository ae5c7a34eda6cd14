"""Weights of tokens: reductions with global denominators, and the mask of repetitive tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.learn.losses.reduction import before_tail, lowest, position_weights, token_weights
from opd_ray.messages import Count
from opd_ray.repetition import repeated_ngrams

REDUCTIONS = ("token", "sequence", "sum")


def test_reductions_equal_hand_computed_numbers() -> None:
    """Rollouts of 1 and 3 tokens with losses 4 | 1 2 3, of a step with 3 rollouts and 8 tokens in all."""
    values, lengths = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([1, 3])
    for reduction, expected in (("token", 10 / 8), ("sequence", (4 + 2) / 3), ("sum", 10)):
        weights = token_weights(lengths, Count(rollouts=3, tokens=8), reduction)
        assert math.isclose((values * weights).sum(), expected, rel_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), cut=st.integers(1, 7), seed=st.integers(0, 99))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_split_into_micro_batches_keeps_its_loss(
    lengths: list[int], cut: int, seed: int, reduction: str
) -> None:
    values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    count = Count(len(lengths), sum(lengths))
    whole = (values * token_weights(torch.tensor(lengths), count, reduction)).sum()
    cut = min(cut, len(lengths) - 1)
    first, second = torch.tensor(lengths[:cut]), torch.tensor(lengths[cut:])
    head, tail = values[: first.sum()], values[first.sum() :]
    split = (head * token_weights(first, count, reduction)).sum()
    split = split + (tail * token_weights(second, count, reduction)).sum()
    torch.testing.assert_close(split, whole)


def test_no_tokens_weigh_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    for reduction in REDUCTIONS:
        assert token_weights(nothing, Count(), reduction).shape == (0,)
    assert before_tail(torch.zeros(0), torch.zeros(0, dtype=torch.bool), nothing).shape == (0,)
    assert position_weights(torch.zeros(0), nothing, 1.5).shape == lowest(torch.zeros(0), nothing, 0.5).shape == (0,)


def test_behind_a_token_that_the_teacher_rules_out_positions_weigh_1_and_others_what_they_did() -> None:
    """The bug: one infinite log-ratio made every weight of the batch no number, and the step was skipped."""
    disagreement, lengths = torch.tensor([1.0, torch.inf, 1.0, 2.0, 2.0]), torch.tensor([3, 2])
    weights = position_weights(disagreement, lengths, 1.5)
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.5, 1.0, 1.5, 1.25]), atol=1e-3, rtol=0)


def test_weights_of_positions_fall_as_disagreement_adds_up() -> None:
    """Rollouts of disagreements 1 3 0 4 | none | 2, by hand: g_t = 1 + .5 (1 − what went before / all)."""
    disagreement, lengths = torch.tensor([1.0, 3.0, 0.0, 4.0, 0.0, 0.0, 2.0]), torch.tensor([4, 2, 1])
    weights = position_weights(disagreement, lengths, 1.5)
    expected = [1.5, 1 + 0.5 * 7 / 8, 1 + 0.5 * 4 / 8, 1 + 0.5 * 4 / 8, 1.5, 1.5, 1.5]
    torch.testing.assert_close(weights, torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), share=st.sampled_from([0.05, 0.2, 0.29, 1.0]))
def test_the_lowest_are_so_many_of_each_rollout(lengths: list[int], share: float) -> None:
    values = torch.randint(0, 5, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths))).float()
    for row, chosen in zip(
        values.split(lengths), lowest(values, torch.tensor(lengths), share).split(lengths), strict=True
    ):
        number = max(1, math.floor(round(share * len(row), 6)))
        assert sorted(row[chosen > 0].tolist()) == sorted(row.tolist())[:number]
        assert set(chosen.tolist()) <= {0.0, 1.0} and chosen.sum() == number


def test_the_share_of_a_long_rollout_is_not_rounded_down() -> None:
    """The bug: .65 · 180 was below 117 in float32."""
    chosen = lowest(torch.arange(360.0), torch.tensor([180, 180]), 0.65)
    assert [row.sum().item() for row in chosen.split(180)] == [117, 117]


def tail_start(repetitive: list[bool]) -> int:
    """By its definition: the shortest of the suffixes with the largest Σ (repetitive − ¾), if that is a tail."""
    scores = {start: sum(4 * each - 3 for each in repetitive[start:]) for start in range(len(repetitive))}
    start = max(scores, key=lambda each: (scores[each], each))
    return start if scores[start] > 0 and len(repetitive) - start >= 7 else len(repetitive)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.booleans(), max_size=20), st.lists(st.sampled_from([True] * 9 + [False]), max_size=30)
        ).filter(any)
        | st.tuples(st.lists(st.booleans(), min_size=1, max_size=8), st.just([])),
        min_size=1,
        max_size=6,
    ),
    cut=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_a_truncated_rollout_counts_until_its_repetitive_tail(rows: list, cut: list[bool]) -> None:
    rows = [head + tail for head, tail in rows]
    expected = []
    for row, truncated in zip(rows, cut, strict=False):
        start = tail_start(row) if truncated else len(row)
        expected += [1.0] * start + [0.0] * (len(row) - start)
    flat = torch.tensor([float(value) for row in rows for value in row])
    lengths = torch.tensor([len(row) for row in rows])
    assert before_tail(flat, torch.tensor(cut[: len(rows)]), lengths).tolist() == expected


def kept_of(*responses: np.ndarray) -> list[int]:
    """Tokens that the mask leaves of each truncated response."""
    lengths = np.array([len(each) for each in responses])
    repetitive = torch.from_numpy(repeated_ngrams(np.concatenate(responses).astype(np.int64), lengths))
    kept = before_tail(repetitive, torch.ones(len(responses), dtype=torch.bool), torch.from_numpy(lengths))
    return [int(each.sum()) for each in kept.split(lengths.tolist())]


def test_a_long_derivation_is_kept_and_a_loop_is_not() -> None:
    """The bug: everything from the first repeated 6-gram on was masked, 87 to 92 % of a healthy long derivation."""
    rng = np.random.default_rng(0)
    healthy = rng.integers(0, 5000, 2000)
    for early in (100, 160, 700, 1400):  # says an equation of 20 tokens again now and then
        healthy[early : early + 20] = healthy[20:40]
    unit = rng.integers(0, 5000, 30)
    looped = np.concatenate([healthy, np.tile(unit, 30)])
    noisy = looped.copy()
    noisy[2100::150] = 7  # the loop varies a token now and then
    assert kept_of(healthy, looped, noisy) == [2000, 2000 + 30 + 5, 2000 + 30 + 5]
