"""The key-value cache of TorchGenerationEngine: rows that come and go, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from opd_ray.generate.decoding import mask_of, use_shared_heads

_FIRST_COLUMNS = 128


class Columns:
    """Keys and values of R responses, the first R rows of buffers [rows, heads, columns, head size], two a layer.

    All of them end at the same column, so that a step writes one column of each buffer; of row r the last
    ``lengths[r]`` columns before it are real. When the last column is reached, or a longer response or more of them
    come, what is real moves to the middle of buffers that are large enough: at most ``rows``, twice the longest one.
    """

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self._model, self._most_rows = model, rows
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._end = 0
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self._shares_heads = use_shared_heads(model)

    def enter(self, prefixes: Sequence[Tensor], row: int) -> Tensor:
        """Computes prefixes [length] and puts them into the rows from ``row`` on; the logits [len(prefixes),
        vocabulary] after them."""
        ids = pad_sequence(list(prefixes), batch_first=True, padding_side="left").to(self._model.device)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=ids.device)
        computed = DynamicCache()
        logits = self._forward(ids, computed, lengths)
        width, rows = ids.shape[1], slice(row, row + len(prefixes))
        if not self._buffers:
            like = [(layer.keys, layer.values) for layer in computed.layers]
            self._allocate(like, rows.stop, max(_FIRST_COLUMNS, 2 * width))
            self._end = self._columns // 2
        self._make_room(row, rows.stop, width)
        self._lengths[rows] = lengths
        for (keys, values), layer in zip(self._buffers, computed.layers, strict=True):
            keys[rows, :, self._end - width : self._end] = layer.keys
            values[rows, :, self._end - width : self._end] = layer.values
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        """Appends a token to each of the first rows; ``tokens`` [R], the logits [R, vocabulary] after them."""
        number = len(tokens)
        self._make_room(number, number, 1)
        self._end += 1
        self._lengths[:number] += 1
        start = self._end - int(self._lengths[:number].max())
        cache = Cache(layers=[_Written(*(each[:number, :, start : self._end] for each in of)) for of in self._buffers])
        return self._forward(tokens[:, None], cache, self._lengths[:number])

    def leave(self, gone: Sequence[int], number: int) -> list[int]:
        """Takes rows out of the first ``number``, and fills their places with the last ones that stay; for each row
        that is left, which one it was."""
        left, dropped = number - len(gone), set(gone)
        holes = [row for row in gone if row < left]
        movers = [row for row in range(left, number) if row not in dropped]
        if holes:
            start = self._end - int(self._lengths[:number].max())
            for each in (buffer for of in self._buffers for buffer in of):
                each[holes, :, start : self._end] = each[movers, :, start : self._end]
            self._lengths[holes] = self._lengths[movers]
        was = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            was[hole] = mover
        return was

    def _forward(self, ids: Tensor, cache: Cache, lengths: Tensor) -> Tensor:
        """Logits [R, vocabulary] after ids [R, n], which the cache takes in; ``lengths`` with them."""
        width = ids.shape[1] + cache.get_seq_length()
        if self._shares_heads and ids.shape[1] == 1:
            mask = mask_of(lengths, width, self._model.dtype)
        else:
            mask = torch.arange(width, device=ids.device) >= width - lengths[:, None]
        positions = lengths[:, None] + torch.arange(-ids.shape[1], 0, device=ids.device)
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _make_room(self, kept_rows: int, rows: int, width: int) -> None:
        """So that there are ``rows``, and ``width`` columns before ``_end`` and one behind it; the first rows keep what
        they have."""
        there = self._buffers[0][0].shape[0]
        if rows <= there and width <= self._end < self._columns:
            return
        kept = int(self._lengths[:kept_rows].max()) if kept_rows else 0
        before, old = slice(self._end - kept, self._end), self._buffers
        if rows > there or 2 * max(kept, width) > self._columns:
            more = there if rows <= there else min(2 * rows, self._most_rows)
            self._allocate(old, more, max(self._columns, 2 * max(kept, width)))
        self._end = self._columns // 2
        for was, now in zip(old, self._buffers, strict=True):
            for source, target in zip(was, now, strict=True):
                target[:kept_rows, :, self._end - kept : self._end] = source[:kept_rows, :, before].clone()

    def _allocate(self, like: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int) -> None:
        self._buffers = [(_zeros(keys, rows, columns), _zeros(values, rows, columns)) for keys, values in like]

    @property
    def _columns(self) -> int:
        return self._buffers[0][0].shape[2]


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))


class _Written(DynamicLayer):
    """One layer's keys and values [R, heads, columns, head size] as the model sees them: its next ones are written into
    the last columns."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._all = keys, values
        self.keys, self.values = keys[:, :, :-1], values[:, :, :-1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, -1:] = new
        self.keys, self.values = self._all
        return self._all
