"""What every benchmark of models works on: the four rows of the race, their checkpoints and prompts, our configuration.

The embedded models are the package's own. The others are random Qwen3 models, which end at random: the embeddings of
all tokens share one large coordinate, which all hidden states therefore have, and the EOS token's row of the output
layer reads it so that each token is EOS with the same probability, .0044. Mean lengths are then 98 at a limit of 128,
203 at 512 (a tenth of the responses reach it) and 154 at 256.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from opd_ray.embedded import prepare as embedded

LEARNING_RATE = 1e-6
EOS_SHARE = 0.0044
_VOCABULARY = {"<|pad|>": 0, "<|eos|>": 1}
_PROMPTS, _PROMPT_TOKENS = 1024, 24


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model with heads of 64, two of them for keys and values."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


@dataclass(frozen=True)
class Row:
    """A race: which models, how much work, and how many steps are measured after how many that are not."""

    models: str
    batch: int
    limit: int
    warmup: int
    steps: int
    student: Shape | None = None
    """None for the embedded models."""
    teacher: Shape | None = None
    vocabulary: int = 0


_SMALL = {"student": Shape(128, 416, 4), "teacher": Shape(256, 704, 5), "vocabulary": 512}
_LARGE = {"student": Shape(512, 1664, 10), "teacher": Shape(768, 2272, 16), "vocabulary": 4096}
ROWS = {
    1: Row("58 k / 150 k", 32, 80, 20, 100),
    2: Row("1 M / 4 M", 32, 128, 8, 30, **_SMALL),
    3: Row("1 M / 4 M", 32, 512, 4, 12, **_SMALL),
    4: Row("36 M / 112 M", 16, 256, 3, 5, **_LARGE),
}


@dataclass(frozen=True)
class Material:
    """What both sides are given."""

    student: Path
    teacher: Path
    prompts: Path


def prepare(row: Row, directory: Path) -> Material:
    """The embedded models and their prompts, or random ones."""
    if row.student is None:
        built = embedded.prepare(0)
        return Material(built / "student", embedded.TEACHER_DIR, built / "prompts.jsonl")
    material = Material(directory / "student", directory / "teacher", directory / "prompts.jsonl")
    _save_random(row.student, row.vocabulary, 0, material.student)
    _save_random(row.teacher, row.vocabulary, 1, material.teacher)
    rng, lines = random.Random(0), []
    for number in range(_PROMPTS):
        words = (f"w{rng.randrange(len(_VOCABULARY), row.vocabulary)}" for _ in range(_PROMPT_TOKENS))
        lines.append(json.dumps({"id": str(number), "prompt": " ".join(words), "answer": "0"}))
    material.prompts.write_text("\n".join(lines) + "\n")
    return material


def _save_random(shape: Shape, vocabulary: int, seed: int, path: Path) -> None:
    """A model whose every token is EOS with about the probability EOS_SHARE, and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    pad, eos = _VOCABULARY
    config = Qwen3Config(
        **asdict(shape),
        vocab_size=vocabulary,
        head_dim=64,
        num_attention_heads=shape.hidden_size // 64,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_VOCABULARY[eos],
        pad_token_id=_VOCABULARY[pad],
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        hidden = model.model(torch.randint(len(_VOCABULARY), vocabulary, (8, 64))).last_hidden_state
        output = model.lm_head.weight
        output[:, 0] = output[_VOCABULARY[eos]] = 0.0
        others = model.lm_head(hidden).logsumexp(-1).mean()
        output[_VOCABULARY[eos], 0] = (math.log(EOS_SHARE / (1 - EOS_SHARE)) + others) / hidden[..., 0].mean()
    model.save_pretrained(path)
    words = _VOCABULARY | {f"w{number}": number for number in range(len(_VOCABULARY), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad).save_pretrained(path)


def overrides(row: Row, material: Material) -> list[str]:
    """Our side's configuration: reverse KL on the whole vocabulary, with no golden rollouts and no reference."""
    method = [
        "loss.student.coef=1",
        "loss.student.divergence=reverse_kl",
        "loss.student.support=full",
        "data.golden=null",
        "loss.golden.coef=0",
        "buffer.golden_per_prompt=0",
        "loss.reference.coef=0",
        f"learner.lr={LEARNING_RATE}",
        f"buffer.prompts_per_step={row.batch}",
        "rollout.responses_per_prompt=1",
        f"rollout.max_response_tokens={row.limit}",
    ]
    if row.student is None:
        return method
    own = {"student.path": material.student, "teacher.path": material.teacher, "data.prompts": material.prompts}
    return [*method, "data.task=chain", *(f"{field}={path}" for field, path in own.items())]
