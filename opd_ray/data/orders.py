"""Endless, reproducible orders over rows: position ``i`` of a run depends on the seed alone.

That is what makes resuming exact: a run that trained ``n`` prompts goes on with prompt ``n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Shuffled:
    """Position ``i`` to row index: every row once per epoch, a new order each epoch or always that of the rows."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
        self._epoch, self._order = -1, np.arange(num_rows)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_rows)
        if self._shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows)
        return int(self._order[offset])


@dataclass(frozen=True)
class Mix:
    """Which rows are of which source, and how often each source is asked."""

    groups: tuple[np.ndarray, ...]
    """Indices of the rows of each source, none of them empty."""
    weights: tuple[float, ...]


class Mixed:
    """Position to row index by weights: an epoch has as many rows as there are, of each source its share of them. The
    rows of one come in turn, through its own epochs: a small source repeats itself, of a large one some rows wait."""

    def __init__(self, mix: Mix, seed: int, shuffle: bool = True) -> None:
        self._mix, self._seed, self._shuffle = mix, seed, shuffle
        self._num_rows = sum(map(len, mix.groups))
        self._shares = _shares(self._num_rows, mix.weights)
        self._within = [Shuffled(len(group), seed + 101 * i, shuffle) for i, group in enumerate(mix.groups, start=1)]
        self._epoch, self._sources, self._nth = -1, np.zeros(0, int), np.zeros(0, int)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_rows)
        if epoch != self._epoch:
            self._begin(epoch)
        source = self._sources[offset]
        index = self._within[source][int(epoch * self._shares[source] + self._nth[offset])]
        return int(self._mix.groups[source][index])

    def _begin(self, epoch: int) -> None:
        """The source of each position of an epoch, and how many of that source come before it."""
        each = [(np.arange(share) + 0.5) / share for share in self._shares]  # evenly spread
        order = np.argsort(np.concatenate(each), kind="stable")
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows)
        self._epoch = epoch
        self._sources = np.repeat(np.arange(len(self._shares)), self._shares)[order]
        self._nth = np.zeros(self._num_rows, int)
        for source, share in enumerate(self._shares):
            self._nth[self._sources == source] = np.arange(share)


def _shares(total: int, weights: Sequence[float]) -> np.ndarray:
    """``total`` in parts by weight, of one at least: whole numbers, the largest remainders rounded up."""
    exact = total * np.asarray(weights) / sum(weights)
    shares = np.maximum(np.floor(exact).astype(int), 1)
    for index in np.argsort(shares - exact, kind="stable")[: max(0, total - shares.sum())]:
        shares[index] += 1
    while shares.sum() > total:
        shares[np.argmax(shares)] -= 1
    return shares


Order = Shuffled | Mixed


def order_of(num_rows: int, mix: Mix | None, seed: int, shuffle: bool) -> Order:
    """In which rows are visited: by the weights of their sources, or each once per epoch."""
    return Shuffled(num_rows, seed, shuffle) if mix is None else Mixed(mix, seed, shuffle)
