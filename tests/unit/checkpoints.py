"""Tiny checkpoints and prompt files on disk: real formats, no model behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

CHARACTERS = ("<pad>", "<eos>", "<end>", *"0123456789+-=ab")


def make_checkpoint(
    path: Path,
    *,
    tokens: Sequence[str] = CHARACTERS,
    vocab_size: int | None = None,
    eos: int | list[int] = 1,
    context: int = 64,
    tied: bool = False,
) -> Path:
    """A checkpoint whose tokenizer has one token per character and whose weights are one number."""
    words = models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    Qwen3Config(
        vocab_size=vocab_size or len(tokens),
        hidden_size=64,
        num_hidden_layers=1,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
    ).save_pretrained(path)
    GenerationConfig(eos_token_id=eos, pad_token_id=0).save_pretrained(path)
    save_file({"weight": np.zeros(1, np.float32)}, path / "model.safetensors")
    return path


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_setting(root: Path) -> dict[str, str]:
    """A student, a teacher and three data files that pass preflight, as ``section.field`` to value."""
    prompts = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "12+1=", "answer": "13"}]
    golden = [{"prompt": "2+2=", "answer": "4", "response": "4"}]
    problems = [{"prompt": "3+3=", "answer": "6"}]
    return {
        "student.path": str(make_checkpoint(root / "student", tied=True)),
        "teacher.path": str(make_checkpoint(root / "teacher")),
        "reference.path": str(root / "student"),
        "data.prompts": str(write_jsonl(root / "prompts.jsonl", prompts)),
        "data.golden": str(write_jsonl(root / "golden.jsonl", golden)),
        "data.evaluation": str(write_jsonl(root / "test.jsonl", problems)),
        "rollout.max_response_tokens": "20",
        "rollout.engine": "torch",
    }
