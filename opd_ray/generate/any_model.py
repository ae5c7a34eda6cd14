"""The next logits of responses that run together, by transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from opd_ray.generate.columns import Columns
from opd_ray.generate.decoding import mask_of, use_shared_heads


class AnyModel:
    """Whatever has keys and values alone to remember."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self._model = model
        self._columns = Columns(rows)
        self._shares_heads = use_shared_heads(model)

    def advance(self, tokens: Tensor, prefixes: Sequence[Tensor]) -> Tensor:
        """Appends ``tokens`` [R] to the first R rows and puts prefixes [length] into those behind them; the logits
        [R + len(prefixes), vocabulary] after all of them."""
        logits = [self._extend(tokens)] if len(tokens) else []
        if prefixes:
            logits.append(self._enter(prefixes, len(tokens)))
        return torch.cat(logits)

    def leave(self, gone: Sequence[int], number: int) -> list[int]:
        """As :meth:`Columns.leave`."""
        return self._columns.leave(gone, number)

    def _enter(self, prefixes: Sequence[Tensor], row: int) -> Tensor:
        ids = pad_sequence(list(prefixes), batch_first=True, padding_side="left").to(self._model.device)
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        computed = DynamicCache()
        logits = self._forward(ids, computed, lengths.to(ids.device))
        columns, width, rows = self._columns, ids.shape[1], slice(row, row + len(prefixes))
        written = [each for layer in computed.layers for each in (layer.keys, layer.values)]
        columns.make_room(written, row, rows.stop, width)
        columns.lengths[rows] = lengths.numpy()
        for buffer, new in zip(columns.buffers, written, strict=True):
            buffer[rows, :, columns.end - width : columns.end] = new
        return logits

    def _extend(self, tokens: Tensor) -> Tensor:
        columns, rows = self._columns, slice(0, len(tokens))
        columns.make_room(columns.buffers, rows.stop, rows.stop, 1)
        columns.end += 1
        columns.lengths[rows] += 1
        real = slice(columns.start(rows), columns.end)
        parts = [buffer[rows, :, real] for buffer in columns.buffers]
        cache = Cache(layers=[_Written(*each) for each in zip(parts[::2], parts[1::2], strict=True)])
        lengths = torch.from_numpy(columns.lengths[rows]).to(tokens.device)
        return self._forward(tokens[:, None], cache, lengths)

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
