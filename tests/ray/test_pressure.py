"""A run whose payloads do not fit into Ray's object store: they are spilled to disk and fetched back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import internal_api
from ray._private.state import state
from transformers import AutoTokenizer

from bare_ray import bare_ray
from opd_ray import config as configs
from opd_ray.run.train import train
from random_models import save_random_model
from rollout_log import rows

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STORE_BYTES = 78 * 2**20
"""Not much more than the least that Ray takes."""
WIDTHS = {"student": 512, "teacher": 4096}


@pytest.fixture
def small_store(preloaded_workers) -> Iterator[None]:
    with bare_ray(preloaded_workers, object_store_memory=STORE_BYTES):
        yield


@pytest.fixture
def wide(world, tmp_path) -> dict[str, Path]:
    """Random models with hidden states that are large for how little there is to compute."""
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    narrow = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    for name, width in WIDTHS.items():
        save_random_model(tmp_path / name, tokenizer, seed=width, hidden_size=width, **narrow)
    return {name: tmp_path / name for name in WIDTHS}


def test_a_run_whose_payloads_are_larger_than_the_object_store_spills_and_goes_on(world, wide, small_store, tmp_path):
    """Hidden states of teacher and reference for three steps in flight, and a snapshot of every step in memory."""
    steps, prompts, responses = 5, 32, 2
    options = [
        f"student.path={wide['student']}",
        f"teacher.path={wide['teacher']}",
        "rollout.engine=torch",
        "rollout.max_response_tokens=40",
        "rollout.max_num_seqs=64",
        "rollout.prompts_per_call=8",
        f"rollout.responses_per_prompt={responses}",
        f"buffer.prompts_per_step={prompts}",
        "loss.student.support=full",
        "loss.reference.estimator=full",
        "checkpoint.memory_every_steps=1",
        f"checkpoint.every_steps={steps}",
        "evaluation.num_problems=0",
        "metrics.rollout_log_every_steps=1",
        f"learner.steps={steps}",
    ]
    run_dir = tmp_path / "run"
    summary = train(configs.load(None, [*world.overrides(), *options]), run_dir)

    assert summary["restarts"] == 0
    logged = [row for row in rows(run_dir) if row["source"] == "student"]
    assert sorted(row["slot"] for row in logged) == [slot for slot in range(steps * prompts) for _ in range(responses)]
    assert summary["staleness"]["max"] == 2, "rollouts of three steps were there at once"
    in_flight = 3 / steps * sum(len(row["response_tokens"]) for row in logged) * 4 * sum(WIDTHS.values())
    assert in_flight > STORE_BYTES
    store = internal_api.get_memory_info_reply(state).store_stats
    assert store.spilled_bytes_total > STORE_BYTES / 2
    assert store.restored_bytes_total > 0, "what was spilled was trained on"
