"""Whether a response repeats itself: by its text, as the paper measures it, and by its tokens, exactly."""

from __future__ import annotations

import zlib

import numpy as np

_SHORTEST_TAIL = 12
"""Tokens that must repeat at least, so that a short word said twice is no loop."""


def is_repetitive(text: str, *, window_chars: int, ratio: float) -> bool:
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
    if len(tokens) < _SHORTEST_TAIL or longest == 0:
        return 0
    # Every period compares at least the last 8 tokens with those p before them: few candidates pass that.
    backwards = tokens[::-1]
    periodic = np.ones(longest, dtype=bool)
    for back in range(8):
        periodic &= backwards[back + 1 : back + 1 + longest] == backwards[back]
    for period in (np.flatnonzero(periodic) + 1).tolist():
        tail = tokens[-max(3 * period, _SHORTEST_TAIL) :]
        if np.array_equal(tail[period:], tail[:-period]):
            return period
    return 0
