"""The learning rate's course, and what payloads of a plan are fetched."""

from __future__ import annotations

import pytest
import torch

from opd_ray.batching import count
from opd_ray.config import LearnerConfig
from opd_ray.messages import Coefficients, StepPlan
from opd_ray.training import disable_dropout, fetch_payloads, lr_factor
from scored_rollouts import scored_entries


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])],
)
def test_learning_rate_rises_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = LearnerConfig(steps=6, warmup_steps=2, lr_schedule=schedule)
    assert [lr_factor(config, step) for step in range(6)] == pytest.approx(expected)


def test_cosine_halves_half_way_and_stays_at_zero_beyond_the_end() -> None:
    config = LearnerConfig(steps=10, lr_schedule="cosine")
    assert [lr_factor(config, step) for step in (0, 5, 10, 20)] == pytest.approx([1, 0.5, 0, 0])


def test_a_payload_that_many_rollouts_share_is_fetched_once() -> None:
    entries = scored_entries([(3, 4), (5, 2), (2, 2)], [(2, 3)])
    plan = StepPlan(0, (tuple(entries[:2]), tuple(entries[2:])), count(entries), Coefficients(1, 1, 1, 1))
    asked = []
    payloads = fetch_payloads(plan, lambda refs: asked.append(len(refs)) or refs)
    assert asked == [7], "two payloads with two scores each, and the golden one"
    assert payloads.keys() == {id(ref) for entry in entries for ref in (entry.rollouts, *entry.scores.values())}


def test_dropout_is_off_wherever_a_model_keeps_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[0].attention_dropout = 0.3
    disable_dropout(model)
    assert model[1].p == model[0].attention_dropout == 0.0
