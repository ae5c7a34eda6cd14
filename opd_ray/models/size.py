"""How large a model is, from its config.json and the headers of its safetensors files: no weights, no torch.

What a size amounts to in memory and on the wire is :mod:`opd_ray.plan`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from opd_ray.config import LoraConfig
from opd_ray.models.weights import headers, on_this_node

_MOST_CACHE_BYTES = 2**30
_STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""By safetensors' names."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a decoder that memory depends on."""

    parameters: int
    """Distinct ones: a tied output layer counts once."""
    vocab_size: int
    """V"""
    hidden_size: int
    """H"""
    num_layers: int
    """L"""
    num_heads: int
    """A"""
    num_kv_heads: int
    """K"""
    head_dim: int
    """d"""
    intermediate_size: int
    """I"""
    tied: bool
    """Is the output layer the embedding?"""
    adapters: int = 0
    """Parameters of low-rank adapters, which are trained in the place of its own; 0 without any."""
    stored_bytes: int = 0
    """Of one number in its files; 0 where they have several precisions, or are not on this node."""

    @property
    def trained(self) -> int:
        """Parameters that a learner trains."""
        return self.adapters or self.parameters

    def with_adapters(self, lora: LoraConfig) -> ModelSize:
        """rank · (in + out) parameters for each layer that gets one, by the names and shapes that Llama, Mistral and
        Qwen give their layers; one of another name counts as H × H."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        both_sides = {
            **dict.fromkeys(("q_proj", "o_proj"), self.hidden_size + queries),
            **dict.fromkeys(("k_proj", "v_proj"), self.hidden_size + keys),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden_size + self.intermediate_size),
        }
        ends = both_sides if lora.targets == "all-linear" else {each.rpartition(".")[2] for each in lora.targets}
        total = sum(both_sides.get(name, 2 * self.hidden_size) for name in ends)
        return replace(self, adapters=lora.rank * self.num_layers * total)

    @property
    def head_parameters(self) -> int:
        """Of the output layer alone."""
        return self.vocab_size * self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of one token in all layers: 2·L·K·d."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


def cache_bytes(token_bytes: int, context_tokens: int, max_num_seqs: int, block_tokens: int = 128) -> int:
    """A key-value cache on a CPU for as many sequences of ``context_tokens`` as an engine runs at once, as far as 1 GiB
    goes, and for one in any case. vLLM deals it out in blocks, and keeps one for itself."""
    blocks = -(-context_tokens // block_tokens)
    one, all_ = (block_tokens * token_bytes * (number * blocks + 1) for number in (1, max_num_seqs))
    return max(one, min(all_, _MOST_CACHE_BYTES))


def size_of(config: Any, path: str | Path) -> ModelSize:
    """That of the checkpoint at ``path``, whose text configuration (transformers') is ``config``.

    Parameters are counted in the headers of the checkpoint's safetensors files. Where these are not on this node (a
    model of the Hub that was never downloaded, or weights in another format) they are those of a dense decoder of its
    configuration.
    """
    heads = getattr(config, "num_attention_heads", None) or 1  # some architectures have no attention
    hidden = config.hidden_size
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": hidden,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden,
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
    }
    parameters, stored_bytes = _counted(path, shape["tied"])
    return ModelSize(parameters=parameters or dense_parameters(**shape), stored_bytes=stored_bytes, **shape)


def dense_parameters(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    tied: bool,
) -> int:
    """Of a decoder as Llama, Mistral and Qwen have it, without the few biases and norms of heads:

        V·H·(1 or 2)  +  L·(2·H·A·d + 2·H·K·d + 3·H·I + 2·H)  +  H

    embedding and output layer; projections of queries and outputs, of keys and values, the gated MLP and two norms.
    """
    attention = 2 * hidden_size * (num_heads + num_kv_heads) * head_dim
    layer = attention + 3 * hidden_size * intermediate_size + 2 * hidden_size
    return vocab_size * hidden_size * (1 if tied else 2) + num_layers * layer + hidden_size


def _counted(path: str | Path, tied: bool) -> tuple[int, int]:
    """Parameters by the headers of the files that lie on this node, and the bytes of each; 0 where there are none."""
    directory = on_this_node(str(path))
    if directory is None:
        return 0, 0
    tensors = {name: (prod(shape), precision) for name, shape, precision in headers(directory)}
    if tied and len(tensors) > 1:
        tensors.pop("lm_head.weight", None)  # saved beside the embedding that it is
    precisions = {precision for _, precision in tensors.values()}
    stored = _STORED_BYTES.get(precisions.pop(), 0) if len(precisions) == 1 else 0
    return sum(number for number, _ in tensors.values()), stored
