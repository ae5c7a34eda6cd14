"""Repetition by text and by tokens."""

import random

import numpy as np
import pytest

from opd_ray.repetition import is_repetitive, tail_period


def by_definition(tokens):
    """The smallest p up to a third of the length with which the last max(3p, 12) tokens repeat."""
    for period in range(1, len(tokens) // 3 + 1):
        span = max(3 * period, 12)
        tail = list(tokens[-span:])
        if span <= len(tokens) and all(tail[i] == tail[i + period] for i in range(span - period)):
            return period
    return 0


def test_text_is_repetitive_when_its_end_compresses_well():
    words = " ".join(f"{number}" for number in random.Random(0).sample(range(10_000), 200))
    assert is_repetitive(words + "so it is. " * 40, window_chars=200, ratio=5.0)
    assert not is_repetitive("so it is. " * 40 + words, window_chars=200, ratio=5.0)
    assert not is_repetitive("so it is. " * 4, window_chars=200, ratio=5.0)


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([7] * 12, 1),
        ([7] * 11, 0),
        ([1, 2, 3, 4] + [5, 6, 7] * 4, 3),
        ([5, 6, 7] * 4 + [9], 0),
        (list(range(20)) * 3, 20),
        (list(range(20)) * 2, 0),
        ([0, *list(range(8)) * 3], 8),
        ([], 0),
        ([1, 2], 0),
    ],
)
def test_the_period_of_the_tail(tokens, period):
    assert tail_period(np.array(tokens, dtype=np.int32)) == by_definition(tokens) == period


def test_the_period_agrees_with_its_definition_on_random_tails():
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(3000):
        unit = rng.integers(0, 2, rng.integers(1, 12))
        tokens = np.concatenate([rng.integers(0, 2, rng.integers(0, 10)), np.tile(unit, 12)[: rng.integers(0, 45)]])
        assert tail_period(tokens) == by_definition(tokens)
        found.add(tail_period(tokens))
    assert len(found) > 5
