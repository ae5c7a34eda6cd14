"""The key-value cache of TorchGenerationEngine: rows that come and go, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_FIRST_COLUMNS = 128
GROUP = 16
"""Rows that are near each other in length: the longest ones stand first, in groups of so many."""


class Columns:
    """Keys and values of R responses, the first R rows of buffers [rows, heads, columns, head size], one or more a
    layer.

    All of them end at the same column, so that a step writes one column of each buffer; of row r the last
    ``lengths[r]`` columns before it are real. When the last column is reached, or a longer response or more of them
    come, what is real moves to the middle of buffers that are large enough: at most ``rows``, twice the longest one.
    """

    def __init__(self, rows: int) -> None:
        self.most_rows = rows
        self.buffers: list[Tensor] = []
        self.end = 0
        """Column behind the last one that is real."""
        self.lengths = np.zeros(rows, np.int64)

    def start(self, rows: slice) -> int:
        """First column that is real in any of them."""
        return self.end - int(self.lengths[rows].max())

    def make_room(self, like: Sequence[Tensor], kept_rows: int, rows: int, width: int) -> bool:
        """So that there are ``rows``, ``width`` columns before ``end`` and one behind it; the first rows keep what they
        have. ``like``: a tensor [*, heads, *, head size] for each buffer. Says whether columns have moved."""
        if not self.buffers:
            self._allocate(like, rows, max(_FIRST_COLUMNS, 2 * width))
            self.end = self._columns // 2
            return True
        there = self.buffers[0].shape[0]
        if rows <= there and width <= self.end < self._columns:
            return False
        kept = int(self.lengths[:kept_rows].max()) if kept_rows else 0
        before, old = slice(self.end - kept, self.end), self.buffers
        if rows > there or 2 * max(kept, width) > self._columns:
            more = there if rows <= there else min(2 * rows, self.most_rows)
            self._allocate(old, more, max(self._columns, 2 * max(kept, width)))
        self.end = self._columns // 2
        overlaps = old is self.buffers and before.start < self.end
        for source, target in zip(old, self.buffers, strict=True):
            moving = source[:kept_rows, :, before]
            target[:kept_rows, :, self.end - kept : self.end] = moving.clone() if overlaps else moving
        return True

    def leave(self, gone: Sequence[int], number: int) -> list[int]:
        """Takes rows out of the first ``number``, and fills their places with others; for each row that is left, which
        one it was.

        A place is filled with the longest row of the group behind it, whose own is then filled alike, and in the last
        group with the last row: those of a group stay near each other in length with few that move.
        """
        was, lengths = list(range(number)), self.lengths
        for place in sorted(gone, reverse=True):
            while (following := (place // GROUP + 1) * GROUP) < len(was):
                longest = max(range(following, min(following + GROUP, len(was))), key=lambda row: lengths[was[row]])
                was[place], place = was[longest], longest
            was[place] = was[-1]
            was.pop()
        # Each comes from further behind, so that none is written over before it was read.
        for row, before in enumerate(was):
            if row != before:
                first = self.end - int(lengths[before])
                for buffer in self.buffers:
                    buffer[row, :, first : self.end] = buffer[before, :, first : self.end]
        self.lengths[: len(was)] = lengths[was]
        return was

    def _allocate(self, like: Sequence[Tensor], rows: int, columns: int) -> None:
        self.buffers = [each.new_zeros((rows, each.shape[1], columns, each.shape[3])) for each in like]

    @property
    def _columns(self) -> int:
        return self.buffers[0].shape[2]
