"""Whether a response repeats itself: by its text, as the paper measures it, and by its tokens, exactly."""

from __future__ import annotations

import zlib

import numpy as np

from opd_ray.messages import RepetitionRule

REPETITIVE_NGRAM = 6
"""Tokens that must recur for the last of them to count as repetitive."""
_HASH_FACTOR = 6_364_136_223_846_793_005
SHORTEST_TAIL = 12
"""Tokens that must repeat at least, so that a short word said twice is no loop."""


def is_repetitive(text: str, window_chars: int, ratio: float) -> bool:
    """rep(o) of StableOPD (arXiv 2604.08527): the last ``window_chars`` characters, as UTF-8,
    shrink by more than ``ratio`` under zlib. A text shorter than the window is never repetitive."""
    if len(text) < window_chars:
        return False
    tail = text[-window_chars:].encode()
    return len(tail) / len(zlib.compress(tail)) > ratio


def tail_period(tokens: np.ndarray) -> int:
    """The smallest p with which the last max(3p, 12) of ``tokens`` [T] repeat; 0 where there is none."""
    tokens = np.asarray(tokens)
    longest = len(tokens) // 3
    if len(tokens) < SHORTEST_TAIL or longest == 0:
        return 0
    # Every period compares at least the last 8 tokens with those p before them: few candidates pass that.
    backwards = tokens[::-1]
    periodic = np.ones(longest, dtype=bool)
    for back in range(8):
        periodic &= backwards[back + 1 : back + 1 + longest] == backwards[back]
    for period in (np.flatnonzero(periodic) + 1).tolist():
        tail = tokens[-max(3 * period, SHORTEST_TAIL) :]
        if np.array_equal(tail[period:], tail[:-period]):
            return period
    return 0


def loop_start(tokens: np.ndarray, rule: RepetitionRule) -> int:
    """Where the copies begin, after the first one, of the loop that ended ``tokens`` [T] by ``rule``: the first of the
    last tokens that each are the one a period before. T where it found none.

    The period is the shortest that the loop has: a rule for larger patterns finds a multiple of it.
    """
    tokens = np.asarray(tokens)
    alike = [_alike(tokens, size) for size in range(1, min(rule.max_pattern_size, len(tokens) // 2) + 1)]
    for size in range(rule.min_pattern_size, len(alike) + 1):
        if alike[size - 1] >= size * (rule.min_count - 1):
            length = size * rule.min_count
            return len(tokens) - next(each for period, each in enumerate(alike, 1) if period + each >= length)
    return len(tokens)


def _alike(tokens: np.ndarray, size: int) -> int:
    """How many of the last tokens are the one ``size`` before."""
    differ = np.flatnonzero(tokens[size:] != tokens[:-size])
    return len(tokens) - size - (int(differ[-1]) + 1 if len(differ) else 0)


def repeated_ngrams(tokens: np.ndarray, lengths: np.ndarray, n: int = REPETITIVE_NGRAM) -> np.ndarray:
    """[N] float32 over the packed ``tokens`` of rows of ``lengths``: 1 where a token ends an n-gram that its row
    held before (METHOD §2). N-grams are told apart by a 64-bit hash."""
    repeated = np.zeros(len(tokens), np.float32)
    key = np.repeat(np.arange(len(lengths)), lengths)
    for back in range(n):
        key = key * _HASH_FACTOR + np.roll(tokens, back)  # wraps around on purpose
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ends = np.flatnonzero(position >= n - 1)
    _, first = np.unique(key[ends], return_index=True)
    repeated[ends] = 1.0
    repeated[ends[first]] = 0.0
    return repeated
