"""jobs/bench_peers.py: what both sides are given. The race itself is what the job is for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from opd_ray import config as configs
from opd_ray.errors import InputError

JOB = Path(__file__).parents[2] / "jobs" / "bench_peers.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_peers", JOB)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module  # where dataclasses look for the names of their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_our_side_is_plain_distillation_on_the_whole_vocabulary(bench: ModuleType, number: int) -> None:
    row = bench.ROWS[number]
    material = bench.Material(Path("/m/student"), Path("/m/teacher"), Path("/m/prompts.jsonl"))
    config = configs.load(None, [*bench.overrides(row, material), "evaluation.num_problems=0"])
    term = config.loss.student
    assert (term.divergence, term.support, term.coef) == ("reverse_kl", "full", 1)
    assert (config.sources, config.uses_reference, config.learner.lr) == (("student",), False, bench.LEARNING_RATE)
    assert (config.buffer.prompts_per_step, config.rollout.responses_per_prompt) == (row.batch, 1)
    assert config.rollout.longest_response == row.limit
    assert config.buffer.max_staleness == 2


def test_an_unknown_row_is_refused_with_the_known_ones(bench: ModuleType) -> None:
    with pytest.raises(InputError, match="there is no row '5'; take of 1, 2, 3, 4"):
        bench._chosen("1,5")


@pytest.mark.slow
def test_random_models_end_with_the_probability_that_they_are_given(bench: ModuleType, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    bench._save_random(bench.Shape(128, 128, 2), 512, 0, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        ends = model(torch.randint(2, 512, (8, 256))).logits.softmax(-1)[..., model.config.eos_token_id]
    assert ends.mean() == pytest.approx(bench.EOS_SHARE, rel=0.05)
