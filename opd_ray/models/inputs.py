"""How prompts and responses lie in what a model reads, and which of its positions predict the response tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def lay_out(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, packing: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(input_ids, position_ids, index) of B sequences with N response tokens in all.

    The response token t is predicted at position t − 1, and the last one predicts nothing: the input ends before it.
    input_ids is [B, T] int64, padded on the right, where causal attention never looks, and position_ids then None;
    packed, both are [1, T], and the positions restart at 0 for each sequence. index is [N] int64: the position in the
    flattened input that predicts each response token. No sequences give one dummy token.
    """
    if not prompts:
        prompts, responses = [np.zeros(1)], [np.zeros(0)]  # the dummy, which predicts nothing
    before, answered = (np.fromiter(map(len, each), np.int64, len(each)) for each in (prompts, responses))
    lengths = before + np.maximum(answered - 1, 0)
    pieces = [piece for pair in zip(prompts, responses, strict=True) for piece in (pair[0], pair[1][:-1])]
    flat, within = np.concatenate(pieces).astype(np.int64), _counted(lengths)
    if packing:
        starts, input_ids, position_ids = np.cumsum(lengths) - lengths, flat[None], torch.from_numpy(within[None])
    else:
        starts, position_ids = np.arange(len(lengths)) * lengths.max(), None
        input_ids = np.zeros((len(lengths), lengths.max()), np.int64)
        input_ids.reshape(-1)[np.repeat(starts, lengths) + within] = flat
    index = np.repeat(starts + before - 1, answered) + _counted(answered)
    return torch.from_numpy(input_ids), position_ids, torch.from_numpy(index)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0 … n - 1 for each n of ``lengths``, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
