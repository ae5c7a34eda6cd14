"""Which of the responses that run together have repeated themselves: vLLM's rule, for all of them at once.

A response ends where, for a pattern size p of its rule, each of its last p · (min_count − 1) tokens is the one p before
it. How many in a row are, is counted for every row and size as tokens come: a step compares each row's token with the
last ones of the row, as many as the largest pattern has, however long the responses are and whatever min_count is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_ray.messages import RepetitionRule

_NEVER = np.iinfo(np.int32).max
_AHEAD = 256
"""Tokens that are written before those that are still looked at move."""


class Repeats:
    """Of ``rows`` responses at most, the first of which are in use."""

    def __init__(self, rows: int) -> None:
        self._rows, self._sizes, self._at = rows, 0, 0
        self._last = np.empty((0, rows), np.int32)
        """[tokens, rows]: those that are looked at from ``_at`` on, the newest first."""
        self._alike = np.empty((0, rows), np.int32)
        """[sizes, rows]: how many last tokens of a row are the one p before; p = 1, 2, ..."""
        self._needed = np.empty((0, rows), np.int32)
        """[sizes, rows]: how many must be."""
        self._columns: dict[RepetitionRule | None, np.ndarray] = {}
        """Of ``_needed``, by rule."""

    def enter(self, row: int, entering: Sequence[tuple[RepetitionRule | None, Sequence[int]]]) -> None:
        """Responses come into the rows from ``row`` on: the rule of each, and the tokens that it has already."""
        largest = max((rule.max_pattern_size for rule, _ in entering if rule), default=0)
        if largest > self._sizes:
            self._grow(largest)
        if not self._sizes:
            return
        rows = slice(row, row + len(entering))
        self._last[:, rows], self._alike[:, rows] = -1, 0
        self._needed[:, rows] = np.stack([self._column(rule) for rule, _ in entering], axis=1)
        for column, (_, tokens) in enumerate(entering, row):
            if len(tokens):
                self._remember(column, np.asarray(tokens, np.int32))

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Appends a token to each of the first rows; those that have repeated themselves with it."""
        if not self._sizes:
            return []
        if self._at == 0:
            self._last[-self._sizes :] = self._last[: self._sizes].copy()
            self._at = _AHEAD
        rows, at = len(tokens), self._at
        alike = self._alike[:, :rows]
        alike += 1
        alike *= self._last[at : at + self._sizes, :rows] == tokens
        self._at = at - 1
        self._last[at - 1, :rows] = tokens
        found = alike >= self._needed[:, :rows]
        return np.flatnonzero(found.any(0)).tolist() if found.any() else []

    def leave(self, was: Sequence[int]) -> None:
        """Rows are left; for each, which one it was."""
        moved = [(row, before) for row, before in enumerate(was) if row != before]
        if moved and self._sizes:
            rows, before = map(list, zip(*moved, strict=True))
            for each in (self._last, self._alike, self._needed):
                each[:, rows] = each[:, before]

    def _grow(self, sizes: int) -> None:
        """Room for larger patterns, which the rows in use don't ask for."""
        was = self._last[self._at : self._at + self._sizes], self._alike, self._needed
        last = np.full((_AHEAD + sizes, self._rows), -1, np.int32)
        self._alike = np.zeros((sizes, self._rows), np.int32)
        self._needed = np.full((sizes, self._rows), _NEVER, np.int32)
        for new, old in zip((last[_AHEAD:], self._alike, self._needed), was, strict=True):
            new[: len(old)] = old
        self._last, self._at, self._sizes, self._columns = last, _AHEAD, sizes, {}

    def _column(self, rule: RepetitionRule | None) -> np.ndarray:
        if rule not in self._columns:
            needed = np.full(self._sizes, _NEVER, np.int32)
            if rule:
                sizes = np.arange(rule.min_pattern_size, rule.max_pattern_size + 1)
                needed[sizes - 1] = sizes * (rule.min_count - 1)
            self._columns[rule] = needed
        return self._columns[rule]

    def _remember(self, row: int, tokens: np.ndarray) -> None:
        recent = tokens[::-1][: self._sizes]
        self._last[self._at : self._at + len(recent), row] = recent
        for size in range(1, min(self._sizes, len(tokens) - 1) + 1):
            differ = np.flatnonzero(tokens[size:] != tokens[:-size])
            self._alike[size - 1, row] = len(tokens) - size - (differ[-1] + 1 if len(differ) else 0)
