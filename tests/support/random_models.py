"""Random models in the form that users give them: a checkpoint directory with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM


def save_random_model(directory: Path, tokenizer: Any, *, seed: int, **sizes: Any) -> None:
    """A Qwen3 with tied embeddings of ``sizes``, whose context is 96 tokens."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        head_dim=32,  # vLLM's CPU attention refuses smaller heads
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
