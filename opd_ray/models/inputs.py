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
    pairs = list(zip(prompts, responses, strict=True))
    rows = [torch.from_numpy(np.concatenate((prompt, response[:-1]))).long() for prompt, response in pairs]
    rows = rows or [torch.zeros(1, dtype=torch.int64)]
    if packing:
        input_ids, position_ids = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
        starts = np.cumsum([0, *map(len, rows[:-1])]).tolist()
    else:
        input_ids, position_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), None
        starts = [row * input_ids.shape[1] for row in range(len(rows))]
    index = [torch.zeros(0, dtype=torch.int64)]
    for start, (prompt, response) in zip(starts, pairs, strict=False):  # without sequences there is one start
        index.append(start + len(prompt) - 1 + torch.arange(len(response)))
    return input_ids, position_ids, torch.cat(index)
