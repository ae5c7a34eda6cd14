"""Weights of tokens: reductions with global denominators, and the mask of repetitive tails."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.learn.losses.reduction import before_repetition, token_weights
from opd_ray.messages import Count

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
    assert before_repetition(torch.zeros(0), torch.zeros(0, dtype=torch.bool), nothing).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.lists(st.booleans(), min_size=1, max_size=8), st.booleans()), min_size=1, max_size=6))
def test_a_truncated_rollout_counts_until_its_first_repetition(rows: list[tuple[list[bool], bool]]) -> None:
    expected = []
    for repetitive, truncated in rows:
        first = repetitive.index(True) if truncated and True in repetitive else len(repetitive)
        expected += [1.0] * first + [0.0] * (len(repetitive) - first)
    flat = torch.tensor([float(value) for row, _ in rows for value in row])
    truncated, lengths = torch.tensor([cut for _, cut in rows]), torch.tensor([len(row) for row, _ in rows])
    assert before_repetition(flat, truncated, lengths).tolist() == expected
