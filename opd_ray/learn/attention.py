"""Attention of the learner, and what keeps the sequences of a packed row apart in it.

transformers tells them apart by a mask of every position against every other: 512 MiB for 16 thousand tokens in
bfloat16, 8 GiB for 64 thousand, and on CPUs three times the time of padded rows. Here sequences of one length are a
call of their own, without a mask; flash attention, where it is there, does the same in one call for all of them.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from opd_ray.config import LearnerConfig
from opd_ray.errors import InputError

_PACKED, _FLASH = "opd_ray_packed", "flash_attention_2"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a state in a packed row from the same one alone, relative to their size, by precision."""


def implementation(learner: LearnerConfig, device: torch.device) -> str:
    """transformers' name of the attention that ``learner`` gets on ``device``."""
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    could = device.type == "cuda" and learner.dtype == "bfloat16" and is_flash_attn_2_available()
    if learner.attention == "flash" or (learner.attention == "auto" and could):
        return _FLASH
    AttentionInterface.register(_PACKED, _apart)
    return _PACKED if learner.packing else "sdpa"


def row_bounds(position_ids: torch.Tensor, implementation: str) -> dict[str, Any]:
    """What a model hands on to its attention about a packed row [1, T], whose positions restart at 0 for each of S
    sequences: [S + 1] int32, where each begins, and where the last one ends."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()
    bounds = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(bounds.diff().max())
    where = bounds.to(position_ids.device) if implementation == _FLASH else bounds
    return {"cu_seq_lens_q": where, "cu_seq_lens_k": where, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def check_packing(causal_lm: Any) -> None:
    """Raises InputError where two sequences in a row see each other: the architecture keeps their bounds from its
    attention, or has layers besides it that pass on what stood before."""
    body, used = causal_lm.base_model, causal_lm.config._attn_implementation
    head = causal_lm.get_output_embeddings()
    alone = torch.arange(8, device=head.weight.device)[None] % head.out_features
    position_ids = torch.arange(8, device=alone.device)[None] % 4
    packed = body(input_ids=alone, position_ids=position_ids, use_cache=False, **row_bounds(position_ids, used))
    second = body(input_ids=alone[:, 4:], use_cache=False).last_hidden_state.float()
    difference = float((packed.last_hidden_state[:, 4:].float() - second).abs().max())
    if not difference <= _TOLERANCE[head.weight.dtype] * max(1.0, float(second.abs().max())):
        raise InputError(
            f"learner.packing: sequences in one row see each other in {type(causal_lm).__name__} (states differ by "
            f"{difference:.2g} from those of the sequence alone); set learner.packing=false"
        )


def _apart(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa for the sequences of a row: [1, T, heads, head size] from [1, heads, T, head size]. Neighbours
    of one length are a batch. Without bounds it is that of sequences as they are."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    batches = [(length, len(list(same))) for length, same in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * number for length, number in batches]
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    parts = []
    for (length, number), row in zip(batches, rows, strict=True):
        batch = [part[0].unflatten(1, (number, length)).transpose(0, 1) for part in row]
        mask = _window(length, sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, *batch, mask, **options)[0].flatten(0, 1))
    return torch.cat(parts)[None], None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a sequence that is longer than the layer looks back."""
    if sliding_window is None or length <= sliding_window:
        return None
    square = torch.ones(length, length, dtype=torch.bool, device=device)
    return (square.tril() & square.triu(1 - sliding_window))[None, None]
