"""Attention of one new token of each of many responses.

transformers' own makes a copy of keys and values for each of the heads that share them, in every step: with 8 heads on
2 of them, responses of 150 tokens and a vocabulary of 4,096 that is two thirds of the engine's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "opd_ray_decoding"


def use_shared_heads(model: PreTrainedModel) -> bool:
    """Gives a model this attention if it has transformers' plain one. Its mask for one new token may then be that of
    :func:`mask_of`, which layers with a sliding window cut by themselves."""
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    return True


def mask_of(lengths: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[R, 1, 1, columns], to be added: 0 in the last ``lengths`` [R] columns of each row, -inf before."""
    there = torch.arange(columns, device=lengths.device) >= columns - lengths[:, None]
    return torch.zeros(there.shape, dtype=dtype, device=there.device).masked_fill_(~there, -torch.inf)[:, None, None]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [R, T, heads, head size] from a query of [R, heads, T, head size]."""
    rows, heads, columns, size = key.shape
    if query.shape[2] > 1 or attention_mask is None or position_bias is not None:
        told = {"scaling": scaling, "position_bias": position_bias, **options}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **told)
    first = columns - min(columns, sliding_window or columns)
    key, value, mask = key[:, :, first:], value[:, :, first:], attention_mask[..., first:]
    grouped = query.view(rows, heads, -1, size)  # the queries that share a head are rows of it
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.flatten(1, 2)[:, None], None
