"""Two tokenizers' tokens of one text, side by side: the shortest stretches that end together.

A span is a smallest group of one's tokens and of the other's that begin and end at the same bytes of the text: what
DPCA (arXiv 2606.09456) calls chunks and SimCT (arXiv 2605.07711) minimal aligned units; GOLD (TRL's GOLDTrainer)
groups tokens so, too, by characters. Bytes let two byte-level tokenizers meet within a character.

Places in a text are counted in half bytes, so that there is room for what is between two places: behind a replaced
byte that is no UTF-8 nothing may meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_REPLACED = "\ufffd"


def readable(raw: bytes, *, whole: bool) -> tuple[str, np.ndarray]:
    """The text of some bytes, U+FFFD for what is no UTF-8; and, for each end of a prefix of the text's own bytes (from
    0 on), its place in ``raw`` in half bytes.

    Not ``whole``: it was cut off, and a character of which the end is missing is left out.
    """
    pieces, places, at = [], [np.zeros(1, np.int64)], 0
    while at < len(raw):
        try:
            good, bad, partial = raw[at:], 0, False
            pieces.append(good.decode())
        except UnicodeDecodeError as error:
            good, bad = good[: error.start], error.end - error.start
            partial = not whole and error.reason == "unexpected end of data"
            pieces.append(good.decode())
        places.append(2 * (at + 1 + np.arange(len(good))))
        at += len(good)
        if bad and not partial:
            pieces.append(_REPLACED)
            places.append(np.array([2 * at + 1, 2 * at + 1, 2 * (at + bad)]))
        at += bad
    return "".join(pieces), np.concatenate(places)


def ends(pieces: Sequence[bytes]) -> np.ndarray:
    """[tokens] int64: where each of the tokens of a text ends, in bytes."""
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def spans(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the span that each token is in, [tokens] int32 for both, -1 behind the last place where they meet.

    ``one`` and ``other`` are the places where the tokens end, never falling.
    """
    shared = np.intersect1d(one, other)
    shared = shared[(shared > 0) & (shared % 2 == 0)]
    return _numbers(one, shared), _numbers(other, shared)


def _numbers(places: np.ndarray, shared: np.ndarray) -> np.ndarray:
    numbers = np.searchsorted(shared, places).astype(np.int32)
    return np.where(numbers < len(shared), numbers, -1).astype(np.int32)
