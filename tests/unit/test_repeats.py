"""Loops that end in the torch engine: the rule is vLLM's, for rows that come, go and move."""

import numpy as np
import pytest

from opd_ray.generate.repeats import Repeats
from opd_ray.messages import RepetitionRule
from repeating_tails import repeats

RULES = [None, RepetitionRule(3, 1, 2), RepetitionRule(5, 2, 3), RepetitionRule(8, 1, 4)]


@pytest.mark.parametrize(("seed", "symbols"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_a_response_ends_at_the_token_with_which_it_repeats_itself(seed, symbols):
    """Rows are as those of an engine: responses come with tokens or without, leave in any order, and others take their
    places; larger patterns are asked for on the way. More steps than are written before the last tokens move."""
    rng, rows, watch, running, found = np.random.default_rng(seed), 6, Repeats(6), [], 0
    for _ in range(400):
        count = int(rng.integers(0, rows - len(running) + 1))
        entering = [
            (RULES[rng.integers(len(RULES))], rng.integers(0, symbols + 1, rng.integers(0, 12)).tolist())
            for _ in range(count)
        ]
        if entering:
            watch.enter(len(running), entering)
            running += [(rule, list(tokens)) for rule, tokens in entering]
        if not running:
            continue
        new = rng.integers(0, symbols + 1, len(running)).tolist()
        ended = watch.extend(new)
        for (_, tokens), token in zip(running, new, strict=True):
            tokens.append(token)
        assert ended == [row for row, (rule, tokens) in enumerate(running) if rule and repeats(tokens, rule)]
        found += len(ended)
        left = [row for row in range(len(running)) if row not in ended and rng.random() > 0.1]
        holes = [row for row in range(len(left)) if row not in left]
        movers = [row for row in left if row >= len(left)]
        was = list(range(len(left)))
        for hole, mover in zip(holes, movers, strict=True):
            was[hole] = mover
        watch.leave(was)
        running = [running[row] for row in was]
    assert found > 50


def test_nothing_is_kept_where_nobody_asks():
    watch = Repeats(4)
    watch.enter(0, [(None, [1] * 50)] * 4)
    assert not any(watch.extend([1] * 4) for _ in range(50))
