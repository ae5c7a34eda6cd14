"""Small byte-level BPE tokenizers that split texts in different places, and rollouts in the tokens of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from opd_ray.messages import ROLLOUT_SCHEMA

EOS, END, MARK = "<|eos|>", "<|end|>", "<|mark|>"


def byte_level(merges: Sequence[tuple[bytes, bytes]], *, first_id: int = 0) -> PreTrainedTokenizerFast:
    """A token for each byte and for each merge of two that are tokens before it; ids from ``first_id`` on, and behind
    them EOS, END and MARK."""
    spelt = bytes_to_unicode()
    pairs = [tuple("".join(spelt[byte] for byte in part) for part in pair) for pair in merges]
    tokens = dict.fromkeys([*spelt.values(), *("".join(pair) for pair in pairs)])
    holes = [f"hole {number}" for number in range(first_id)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*holes, *tokens])}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in (EOS, END, MARK)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def rollouts(*rows: dict[str, Any]) -> pa.RecordBatch:
    """Of response_tokens, finish_reason and whatever else is given."""
    defaults = {"slot": 0, "prompt_id": "p", "source": "student", "prompt_tokens": [5], "topk_ids": [], "text": ""}
    defaults |= {"correct": True, "privileged_prompt_tokens": [7, 8], "finish_reason": "stop"}
    made = []
    for number, row in enumerate(rows):
        length = len(row["response_tokens"])
        own = {"behaviour_logprobs": [-0.5 - 0.25 * t for t in range(length)], "weight_versions": [0] * length}
        made.append(defaults | {"rollout_id": f"{number}-0"} | own | row)
    return pa.RecordBatch.from_pylist(made, schema=ROLLOUT_SCHEMA)
