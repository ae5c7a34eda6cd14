"""A Ray of this machine for the integration tests, and a world of small files to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from opd_ray.tasks.chain import draw_distinct, to_row


@dataclass(frozen=True)
class World:
    """Checkpoints and prompt files in the form that users give them."""

    student: Path
    teacher: Path
    prompts: Path
    golden: Path
    evaluation: Path

    def overrides(self) -> list[str]:
        """The configuration's fields that name these files."""
        return [
            f"student.path={self.student}",
            f"teacher.path={self.teacher}",
            f"data.prompts={self.prompts}",
            f"data.golden={self.golden}",
            f"data.evaluation={self.evaluation}",
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Random models of two sizes with the embedded tokenizer, and problems of the chain task."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from opd_ray.embedded import TEACHER_DIR

    root = tmp_path_factory.mktemp("world")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER_DIR)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1 + seed,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=96,
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    train = draw_distinct(rng, "train", 80)
    files = {
        "prompts": [to_row(problem) for problem in train[:64]],
        "golden": [to_row(problem, with_solution=True) for problem in train[64:]],
        "evaluation": [to_row(problem) for problem in draw_distinct(rng, "test", 32)],
    }
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(root / "student", root / "teacher", *(root / f"{name}.jsonl" for name in files))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray started by the tests, on this machine, with more logical CPUs than it has."""
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
