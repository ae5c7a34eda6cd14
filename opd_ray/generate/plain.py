"""The next logits of responses that run together, for architectures whose arithmetic is written out here.

transformers' modules take a millisecond a layer and step, whatever its size: for a student of a million parameters
that is half of a step of 64 responses, and most of one of fewer. Here a step is one pass: a token of each running
response and the whole prefixes of those that enter go through the layers side by side, and part for attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from opd_ray.generate.columns import GROUP, Columns

_ARCHITECTURES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Those whose angles follow from the position alone."""
_PADDING_BYTES = 150_000
"""Keys and values that rows may read in vain: reading them takes as long as a call of their own."""


def is_plain(model: PreTrainedModel) -> bool:
    """Is it one of those here, in float32 on a CPU, with attention that looks all the way back?"""
    if type(model) not in _ARCHITECTURES or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    rotary, size = model.model.rotary_emb, model.model.layers[0].self_attn.head_dim
    turns = rotary.rope_type in _ROTATIONS and 2 * len(rotary.inv_freq) == size
    # Of a directory with adapters peft puts its own in their place, whose weight is that of the base alone.
    linears = [each for name, each in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    return turns and set(kinds) == {"full_attention"} and all(type(each) is nn.Linear for each in linears)


@dataclass(frozen=True)
class _Step:
    """Whose tokens [N] a pass has: one of each running row, and behind them whole prefixes."""

    running: int
    groups: list[tuple[slice, slice, Tensor]]
    """Running rows that attend together, the columns that they look at, and their mask."""
    prefixes: list[tuple[slice, slice, int]]
    """Entering rows that attend together, their tokens, and the length of each."""
    last: Tensor
    """[rows] where the last token of each row is."""


class PlainModel:
    """A Llama, Qwen2 or Qwen3: the calls and logits of AnyModel."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        config, attention = model.config, model.model.layers[0].self_attn
        self._model, self._output = model.model, model.lm_head
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._heads, self._shared, self._size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
        )
        self._columns = Columns(rows)
        self._like = [torch.empty(0, 2 * self._shared, 0, self._size)] * len(self._layers)
        """A layer's buffer has its keys, and behind them its values."""
        self._mask = torch.empty(0, 0)
        """[rows, columns] -inf before what is real of a row, else 0."""
        self._angles = torch.empty(2, 0, 1, self._size)
        """Cosines and sines of each position, these with the sign of :func:`_turned`."""

    def advance(self, tokens: Tensor, prefixes: Sequence[Tensor]) -> Tensor:
        """Appends ``tokens`` [R] to the first R rows and puts prefixes [length] into those behind them; the logits
        [R + len(prefixes), vocabulary] after all of them."""
        running, lengths = len(tokens), [len(prefix) for prefix in prefixes]
        columns, rows = self._columns, running + len(prefixes)
        moved = columns.make_room(self._like, running, rows, max(lengths, default=1))
        if moved:
            self._cover(slice(0, running))
        columns.end += 1
        columns.lengths[:running] += 1
        columns.lengths[running:rows] = lengths
        if prefixes:
            self._cover(slice(running, rows))
        counts = torch.from_numpy(columns.lengths[:rows].copy())
        ids = torch.cat([tokens, *prefixes])
        positions = torch.cat([counts[:running] - 1, *map(torch.arange, lengths)])
        ends = counts[running:].cumsum(0) + (running - 1)
        step = _Step(running, self._groups(running), _alike(running, lengths), torch.cat([torch.arange(running), ends]))
        return linear(self._pass(ids, positions, step), self._output.weight, self._output.bias)

    def leave(self, gone: Sequence[int], number: int) -> list[int]:
        """As :meth:`Columns.leave`."""
        was = self._columns.leave(gone, number)
        moved = [row for row, before in enumerate(was) if row != before]
        self._mask[moved] = self._mask[[was[row] for row in moved]]
        return was

    def _pass(self, ids: Tensor, positions: Tensor, step: _Step) -> Tensor:
        """States [rows, width] behind the last token of each row."""
        states = self._model.embed_tokens(ids)
        cosines, sines = self._at(positions)
        for layer, buffer in zip(self._layers, self._columns.buffers, strict=True):
            heads = layer.heads(states).view(len(ids), -1, self._size)
            turning, values = heads[:, : -self._shared], heads[:, -self._shared :]
            turned = _turned(layer.normed(turning, self._heads), cosines, sines)
            queries, keys = turned[:, : self._heads], turned[:, self._heads :]
            attended = torch.cat(
                [
                    *self._decode(buffer, queries, keys, values, step),
                    *self._prefill(buffer, queries, keys, values, step),
                ]
            )
            if layer is self._layers[-1] and step.prefixes:
                attended, states = attended[step.last], states[step.last]
            states = layer.rest(states, attended)
        return _rms(states, self._model.norm)

    def _decode(self, buffer: Tensor, queries: Tensor, keys: Tensor, values: Tensor, step: _Step) -> list[Tensor]:
        """Attention of a token of each running row: [rows, heads · head size] of each group."""
        running, shared = slice(0, step.running), self._shared
        column = buffer[running, :, self._columns.end - 1]
        column[:, :shared] = keys[running]
        column[:, shared:] = values[running]
        grouped = queries.unflatten(1, (shared, -1))  # the queries that share a head are rows of it
        attended = []
        for rows, real, mask in step.groups:
            there = buffer[rows, :, real]
            own = scaled_dot_product_attention(grouped[rows], there[:, :shared], there[:, shared:], attn_mask=mask)
            attended.append(own.flatten(1))
        return attended

    def _prefill(self, buffer: Tensor, queries: Tensor, keys: Tensor, values: Tensor, step: _Step) -> list[Tensor]:
        """Attention within prefixes: [tokens, heads · head size] of those of each length."""
        shared, end, attended = self._shared, self._columns.end, []
        for rows, tokens, length in step.prefixes:
            # [prefixes, heads, length, head size]
            query, key, value = (
                each[tokens].unflatten(0, (-1, length)).transpose(1, 2) for each in (queries, keys, values)
            )
            buffer[rows, :shared, end - length : end] = key
            buffer[rows, shared:, end - length : end] = value
            own = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self._heads != shared)
            attended.append(own.transpose(1, 2).flatten(2).flatten(0, 1))
        return attended

    def _groups(self, running: int) -> list[tuple[slice, slice, Tensor]]:
        """Rows near each other in length, what is real of any of them, and their mask."""
        column_bytes = 2 * self._shared * self._size * self._mask.element_size()
        found: list[tuple[int, int, int]] = []
        for first in range(0, running, GROUP):
            behind = min(first + GROUP, running)
            start = self._columns.start(slice(first, behind))
            if found:
                begun, _, before = found[-1]
                longest = min(before, start)
                padding = (first - begun) * (before - longest) + (behind - first) * (start - longest)
                if padding * column_bytes <= _PADDING_BYTES:
                    found[-1] = begun, behind, longest
                    continue
            found.append((first, behind, start))
        sides = [(slice(first, behind), slice(start, self._columns.end)) for first, behind, start in found]
        return [(rows, real, self._mask[rows, None, None, real]) for rows, real in sides]

    def _cover(self, rows: slice) -> None:
        """Makes the mask of rows, which holds for as long as they stay where they are."""
        first = self._columns.buffers[0]
        size = first.shape[0], first.shape[2]
        if self._mask.shape != size:
            self._mask = torch.zeros(size)
        starts = self._columns.end - torch.from_numpy(self._columns.lengths[rows])
        before = torch.arange(size[1]) < starts[:, None]
        self._mask[rows] = torch.zeros(before.shape).masked_fill_(before, -torch.inf)

    def _at(self, positions: Tensor) -> Tensor:
        """Cosines and sines [2, N, 1, head size] of positions [N]."""
        known = self._angles.shape[1]
        if (needed := int(self._columns.lengths.max())) > known:
            every = torch.arange(2 * needed)[None]
            cosines, sines = self._model.rotary_emb(self._output.weight, every)
            sines[..., : self._size // 2].neg_()
            self._angles = torch.cat([cosines, sines])[:, :, None]
        return self._angles[:, positions]


class _Layer:
    """One layer. Its parameters are asked for their tensors at each use, which change under way."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._before, self._between = layer.input_layernorm, layer.post_attention_layernorm
        self._projections = attention.q_proj, attention.k_proj, attention.v_proj
        self._norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self._joined, self._act = attention.o_proj, mlp.act_fn
        self._gate, self._up, self._down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def heads(self, states: Tensor) -> Tensor:
        """Queries, keys and values [N, their heads · head size]."""
        normed = _rms(states, self._before)
        return torch.cat([linear(normed, each.weight, each.bias) for each in self._projections], -1)

    def normed(self, heads: Tensor, queries: int) -> Tensor:
        """Queries and keys [N, heads, head size], normalised where the architecture does that."""
        if self._norms is None:
            return heads
        of_queries, of_keys = self._norms
        shares = queries, heads.shape[1] - queries
        weight = torch.cat([norm.weight.expand(share, -1) for norm, share in zip(self._norms, shares, strict=True)])
        assert of_queries.variance_epsilon == of_keys.variance_epsilon
        return rms_norm(heads, heads.shape[-1:], eps=of_queries.variance_epsilon) * weight

    def rest(self, states: Tensor, attended: Tensor) -> Tensor:
        """States [N, width] behind the layer."""
        states = states + linear(attended, self._joined.weight, self._joined.bias)
        normed = _rms(states, self._between)
        gate = self._act(linear(normed, self._gate.weight, self._gate.bias))
        return states + linear(
            gate * linear(normed, self._up.weight, self._up.bias), self._down.weight, self._down.bias
        )


def _rms(states: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of heads [N, heads, head size]: its halves change places with a sign, which the sines have."""
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, -1), sines)


def _alike(running: int, lengths: Sequence[int]) -> list[tuple[slice, slice, int]]:
    """Prefixes of one length that follow each other: their rows, their tokens, and the length."""
    row = token = running
    found = []
    for length, those in groupby(lengths):
        number = len(list(those))
        found.append((slice(row, row + number), slice(token, token + number * length), length))
        row, token = row + number, token + number * length
    return found
