"""jobs/race_material.py: what both sides of a race are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from race_material import EOS_SHARE, LEARNING_RATE, ROWS, Material, Shape, _save_random, overrides

from opd_ray import config as configs


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_our_side_is_plain_distillation_on_the_whole_vocabulary(number: int) -> None:
    row = ROWS[number]
    material = Material(Path("/m/student"), Path("/m/teacher"), Path("/m/prompts.jsonl"))
    config = configs.load(None, [*overrides(row, material), "evaluation.num_problems=0"])
    term = config.loss.student
    assert (term.divergence, term.support, term.coef) == ("reverse_kl", "full", 1)
    assert (config.sources, config.uses_reference, config.learner.lr) == (("student",), False, LEARNING_RATE)
    assert (config.buffer.prompts_per_step, config.rollout.responses_per_prompt) == (row.batch, 1)
    assert config.rollout.longest_response == row.limit
    assert config.buffer.max_staleness == 2


@pytest.mark.slow
def test_random_models_end_with_the_probability_that_they_are_given(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _save_random(Shape(128, 128, 2), 512, 0, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        ends = model(torch.randint(2, 512, (8, 256))).logits.softmax(-1)[..., model.config.eos_token_id]
    assert ends.mean() == pytest.approx(EOS_SHARE, rel=0.05)
