"""Tiny checkpoints and prompt files on disk: real formats, no model behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.messages import ROLLOUT_SCHEMA

CHARACTERS = ("<pad>", "<eos>", "<end>", *"0123456789+-=ab")


def make_checkpoint(
    path: Path,
    *,
    tokens: Sequence[str] = CHARACTERS,
    vocab_size: int | None = None,
    eos: int | list[int] = 1,
    context: int = 64,
    tied: bool = False,
    chat_template: str | None = None,
) -> Path:
    """A checkpoint whose tokenizer has one token per character and whose weights are one number.

    Tokens in angle brackets are added tokens, as chat markup is in real tokenizers.
    """
    words = models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([token for token in tokens if token.startswith("<")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat_template
    ).save_pretrained(path)
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


def encode(text: str) -> list[int]:
    """Token ids of text without markup, by hand."""
    return [CHARACTERS.index(character) for character in text]


def write_rollouts(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A rollout log of ROLLOUT_SCHEMA with what ``rows`` say; prompt and response are token ids."""
    defaults = {"slot": 0, "source": "teacher", "finish_reason": "stop", "correct": True}
    lists = [field.name for field in ROLLOUT_SCHEMA if pa.types.is_list(field.type)]
    table = []
    for number, row in enumerate(rows):
        text = "".join(CHARACTERS[token] for token in row["response_tokens"] if token > 2)
        names = {"rollout_id": str(number), "prompt_id": str(number + 1), "text": text}
        table.append(defaults | dict.fromkeys(lists, []) | names | dict(row))
    pq.write_table(pa.Table.from_pylist(table, schema=ROLLOUT_SCHEMA), path)
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
        "data.task": "chain",
        "data.prompts": str(write_jsonl(root / "prompts.jsonl", prompts)),
        "data.golden": str(write_jsonl(root / "golden.jsonl", golden)),
        "data.evaluation": str(write_jsonl(root / "test.jsonl", problems)),
        "rollout.max_response_tokens": "20",
        "rollout.engine": "torch",
    }


def configured(setting: dict[str, str], **changes: str) -> Config:
    """The configuration of a setting; ``a__b`` changes the field a.b."""
    merged = setting | {name.replace("__", "."): value for name, value in changes.items()}
    return configs.load(None, [f"{name}={value}" for name, value in merged.items()])


def refused(check: Callable[[], object]) -> str:
    """The one line with which ``check`` refuses its input."""
    with pytest.raises(InputError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    return message
