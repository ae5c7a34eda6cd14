"""A Ray of this machine for the integration tests, and a world of small files to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

import worker_setup
from bare_ray import bare_ray
from embedded_preset import preset
from opd_ray.tasks.chain import draw_distinct, to_row

ray_constants.SETUP_WORKER_FILENAME = worker_setup.__file__


@dataclass(frozen=True)
class World:
    """Checkpoints and prompt files in the form that users give them."""

    student: Path
    teacher: Path
    pairs: Path
    """Another teacher, with the tokenizer of embedded-pairs."""
    prompts: Path
    golden: Path
    evaluation: Path

    def overrides(self) -> list[str]:
        """The configuration's fields that name these files, and what small models need."""
        return [
            *preset(),
            f"student.path={self.student}",
            f"teacher.path={self.teacher}",
            f"data.prompts={self.prompts}",
            f"data.golden={self.golden}",
            f"data.evaluation={self.evaluation}",
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Random models of two sizes with the embedded tokenizer, and problems of the chain task."""
    from transformers import AutoTokenizer

    from opd_ray.embedded.models import PAIRS, make_tokenizer
    from opd_ray.embedded.prepare import TEACHER_DIR
    from random_models import save_random_model

    root = tmp_path_factory.mktemp("world")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER_DIR)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    for seed, name in enumerate(("student", "teacher")):
        layers = {"num_hidden_layers": 1 + seed, "initializer_range": 0.1}
        save_random_model(root / name, tokenizer, seed=seed, **sizes, **layers)
    rng = random.Random(0)
    train = draw_distinct(rng, "train", 80)
    files = {
        "prompts": [to_row(problem) for problem in train[:64]],
        "golden": [to_row(problem, with_solution=True) for problem in train[64:]],
        "evaluation": [to_row(problem) for problem in draw_distinct(rng, "test", 32)],
    }
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_random_model(root / "pairs", make_tokenizer(alphabet=PAIRS), seed=2, **sizes, num_hidden_layers=1)
    return World(
        *(root / name for name in ("student", "teacher", "pairs")), *(root / f"{name}.jsonl" for name in files)
    )


@pytest.fixture(scope="session")
def preloaded_workers(preloaded_python: str) -> dict[str, Any]:
    """The runtime environment of workers that have imported what they need before they start."""
    return {"py_executable": preloaded_python}


@pytest.fixture(scope="session")
def preloaded_job(preloaded_workers: dict[str, Any]) -> dict[str, str]:
    """The environment that gives the workers of a driver in a process of its own that runtime environment."""
    return {RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps({"runtime_env": preloaded_workers})}


@pytest.fixture(scope="module")
def ray_here(preloaded_workers: dict[str, Any]) -> Iterator[None]:
    with bare_ray(preloaded_workers):
        yield
