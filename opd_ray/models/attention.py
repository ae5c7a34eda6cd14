"""Attention of packed rows, and what keeps their sequences apart in it.

transformers tells them apart by a mask of every position against every other: 512 MiB for 16 thousand tokens in
bfloat16, 8 GiB for 64 thousand, and on CPUs three times the time of padded rows. Here sequences of about one length are
a call of their own, without a mask, and padded in it alone; flash attention, where it is there, does the same in one
call for all of them and without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd_ray.config import LearnerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED, _FLASH = "opd_ray_packed", "flash_attention_2"
_MOST_PADDED = 4096
"""Pairs of query and key that padding may add to a sequence: computing them takes as long as a call for itself."""
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


def can_pack(model: PreTrainedModel) -> bool:
    """Has a frozen model on a CPU take packed rows, if it keeps their sequences apart then."""
    from transformers import AttentionInterface

    was = model.config._attn_implementation
    if was != "sdpa" or model.device.type != "cpu":
        return False
    AttentionInterface.register(_PACKED, _apart)
    model.set_attn_implementation(_PACKED)
    if seen_across(model) is None:
        return True
    model.set_attn_implementation(was)
    return False


def row_bounds(position_ids: torch.Tensor, implementation: str) -> dict[str, Any]:
    """What a model hands on to its attention about a packed row [1, T], whose positions restart at 0 for each of S
    sequences. Flash attention's are [S + 1] int32, where each begins and where the last one ends."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()
    bounds = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).to(torch.int32)
    if implementation != _FLASH:
        return {"batches": Batches.of(bounds, position_ids.device)}
    longest, where = int(bounds.diff().max()), bounds.to(position_ids.device)
    return {"cu_seq_lens_q": where, "cu_seq_lens_k": where, "max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class Batches:
    """The sequences of a packed row of T tokens in batches of about one length, padded on the right to P tokens."""

    shapes: tuple[tuple[int, int], ...]
    """(sequences, longest of them) of each batch."""
    taken: torch.Tensor
    """[P] which token of the row stands there; the sequence's first where it is padding."""
    place: torch.Tensor
    """[T] where each token of the row stands in the batches."""
    padding: torch.Tensor
    """[P, 1, 1] bool."""

    @classmethod
    def of(cls, bounds: torch.Tensor, device: torch.device) -> Batches:
        """``bounds`` [S + 1] is where each of S sequences begins, and where the last one ends."""
        lengths, order = bounds.diff().sort(descending=True, stable=True)
        widths: list[int] = []
        for length in lengths.tolist():
            fits = widths and (widths[-1] - length) * widths[-1] <= _MOST_PADDED
            widths.append(widths[-1] if fits else length)
        starts, columns = bounds[order].long(), torch.tensor(widths)
        within = torch.cat([torch.arange(width) for width in widths])
        padding = within >= lengths.repeat_interleave(columns)
        taken = starts.repeat_interleave(columns) + within.masked_fill(padding, 0)
        place = torch.empty(int(bounds[-1]), dtype=torch.int64)
        place[taken[~padding]] = (~padding).nonzero()[:, 0]
        shapes = tuple((widths.count(width), width) for width in dict.fromkeys(widths))
        return cls(shapes, taken.to(device), place.to(device), padding[:, None, None].to(device))

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """[sequences, heads, longest, head size] of each batch, from [1, heads, T, head size]."""
        padded = _Rows.apply(row[0].transpose(0, 1), self.taken, self.place, None)
        parts = padded.split([number * width for number, width in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[1, T, heads, head size] from [sequences, longest, heads, head size] of each batch."""
        padded = torch.cat([part.flatten(0, 1) for part in parts])
        return _Rows.apply(padded, self.place, self.taken, self.padding)[None]


class _Rows(torch.autograd.Function):
    """``source[index]``, of which ``back`` is the inverse but for ``padding``: its gradient is an index, too, where
    torch's own adds row by row. What is padding has no gradient: causal attention never looks at it."""

    @staticmethod
    def forward(
        context: Any, source: torch.Tensor, index: torch.Tensor, back: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        context.save_for_backward(back, padding)
        return source.index_select(0, index)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back, padding = context.saved_tensors
        own = gradient.index_select(0, back)
        return own if padding is None else own.masked_fill_(padding, 0.0), None, None, None


@torch.no_grad()
def seen_across(causal_lm: Any) -> str | None:
    """Says so where two sequences in a row see each other: the architecture keeps their bounds from its attention, or
    has layers besides it that pass on what stood before."""
    body, used = causal_lm.base_model, causal_lm.config._attn_implementation
    head = causal_lm.get_output_embeddings()
    alone = torch.arange(8, device=head.weight.device)[None] % head.out_features
    position_ids = torch.arange(8, device=alone.device)[None] % 4
    packed = body(input_ids=alone, position_ids=position_ids, use_cache=False, **row_bounds(position_ids, used))
    second = body(input_ids=alone[:, 4:], use_cache=False).last_hidden_state.float()
    difference = float((packed.last_hidden_state[:, 4:].float() - second).abs().max())
    if difference <= _TOLERANCE[head.weight.dtype] * max(1.0, float(second.abs().max())):
        return None
    return (
        f"sequences in one row see each other in {type(causal_lm).__name__} (states differ by {difference:.2g} from "
        "those of the sequence alone)"
    )


def _apart(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    batches: Batches | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa for the sequences of a row: [1, T, heads, head size] from [1, heads, T, head size]. Without
    ``batches`` it is that of sequences as they are."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if batches is None:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    parts = []
    for batch in zip(*map(batches.split, (query, key, value)), strict=True):
        mask = _window(batch[0].shape[2], sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, *batch, mask, **options)[0])
    return batches.joined(parts), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a sequence that is longer than the layer looks back."""
    if sliding_window is None or length <= sliding_window:
        return None
    square = torch.ones(length, length, dtype=torch.bool, device=device)
    return (square.tril() & square.triu(1 - sliding_window))[None, None]
