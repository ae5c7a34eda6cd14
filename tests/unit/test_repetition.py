"""Repetition by text and by tokens."""

import random

import numpy as np
import pytest

from opd_ray.generate.repeats import Repeats
from opd_ray.messages import RepetitionRule
from opd_ray.repetition import is_repetitive, loop_start, tail_period


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


@pytest.mark.parametrize(
    ("tokens", "rule", "start"),
    [
        ([1, 2, 3, 4, 3, 4, 3, 4], RepetitionRule(4, 1, 3), 4),
        ([7, 7, 7, 7, 7, 7], RepetitionRule(4, 3, 2), 1),  # found as two threes, said one by one
        ([5, 2, 3, 2, 3, 2, 3, 2, 3], RepetitionRule(4, 3, 2), 3),  # found as two fours
        ([3, 1, 2, 3, 1, 2, 3], RepetitionRule(3, 1, 2), 3),  # a part of the first copy stands before it
        ([1, 2, 3, 4, 3, 4, 3, 4, 5], RepetitionRule(4, 1, 3), 9),  # what has gone on is no loop
        ([1, 2, 1, 2], RepetitionRule(4, 1, 3), 4),
        ([], RepetitionRule(4, 1, 3), 0),
    ],
)
def test_the_copies_of_a_loop_begin_after_the_first_one(tokens, rule, start):
    assert loop_start(np.array(tokens, dtype=np.int32), rule) == start


def test_every_loop_that_the_engine_ends_is_found_and_made_of_its_shortest_period():
    rng, found = np.random.default_rng(0), set()
    for _ in range(400):
        rule = RepetitionRule(*sorted(rng.integers(1, 7, 2).tolist(), reverse=True), int(rng.integers(2, 5)))
        watch, tokens = Repeats(1), []
        watch.enter(0, [(rule, tokens)])
        while len(tokens) < 60:
            tokens.append(int(rng.integers(0, 2)) if rng.random() < 0.3 or len(tokens) < 6 else tokens[-5])
            if watch.extend(tokens[-1:]):
                break
        else:
            assert loop_start(np.array(tokens), rule) == len(tokens)
            continue
        start = loop_start(np.array(tokens), rule)
        sizes = range(1, rule.max_pattern_size + 1)
        ended = min(
            p
            for p in sizes[rule.min_pattern_size - 1 :]
            if tokens[-p * (rule.min_count - 1) :] == tokens[-p * rule.min_count : -p]
        )
        loop = tokens[-ended * rule.min_count :]
        period = next(p for p in sizes if loop[p:] == loop[:-p])
        expected = len(tokens)
        while expected > period and tokens[expected - 1] == tokens[expected - 1 - period]:
            expected -= 1
        assert start == expected
        found.add((ended, period))
    assert len(found) > 5 and any(period < ended for ended, period in found)
