"""The learning rate's course, and what payloads of a plan are fetched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError, OutOfDiskError, OwnerDiedError, RayTaskError

from opd_ray.buffer.plan import count
from opd_ray.config import LearnerConfig
from opd_ray.learn.microbatch import disable_dropout, fetch_payloads, is_loss, lr_factor
from opd_ray.messages import Coefficients, StepPlan
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
    payloads, lost = fetch_payloads(plan, lambda refs: asked.append(len(refs)) or refs)
    assert asked == [7], "two payloads with two scores each, and the golden one"
    assert payloads.keys() == {id(ref) for entry in entries for ref in (entry.rollouts, *entry.scores.values())}
    assert lost == ()


def test_a_payload_that_is_gone_names_the_rollouts_that_share_it() -> None:
    entries = scored_entries([(3, 4), (5, 2), (2, 2)], [(2, 3)])
    plan = StepPlan(0, (tuple(entries[:2]), tuple(entries[2:])), count(entries), Coefficients(1, 1, 1, 1))
    gone = [entries[1].scores["reference"], entries[3].rollouts]

    def fetch(refs: list[Any]) -> list[Any]:
        if any(ref is lost for ref in refs for lost in gone):
            raise ObjectLostError("ff", None, "")
        return refs

    shared = [entry for entry in entries if entry.scores.get("reference") is gone[0]] + [entries[3]]
    assert len(shared) > 2
    assert fetch_payloads(plan, fetch)[1] == tuple(entry.meta.rollout_id for entry in shared)


def test_a_payload_that_is_back_is_no_loss() -> None:
    entries = scored_entries([(3, 4), (5, 2)])
    plan = StepPlan(0, (tuple(entries),), count(entries), Coefficients(1, 1, 1, 1))
    gone = [True]

    def fetch(refs: list[Any]) -> list[Any]:
        if gone and gone.pop():
            raise ObjectLostError("ff", None, "")
        return refs

    assert fetch_payloads(plan, fetch) == fetch_payloads(plan, lambda refs: refs)


def test_a_loss_is_told_from_other_failures_of_the_object_store() -> None:
    assert is_loss(OwnerDiedError("ff", None, ""))
    assert is_loss(RayTaskError("score", "traceback", ObjectLostError("ff", None, "")))
    assert is_loss(RayTaskError("score", "traceback", ObjectLostError("ff", None, "")).as_instanceof_cause())
    assert not is_loss(OutOfDiskError("full"))
    assert not is_loss(RayTaskError("score", "traceback", ValueError("no")))
    entries = scored_entries([(3, 4)], [])
    plan = StepPlan(0, (tuple(entries),), count(entries), Coefficients(1, 1, 1, 1))
    with pytest.raises(OutOfDiskError):
        fetch_payloads(plan, _full_disk)


def _full_disk(_refs: list[Any]) -> list[Any]:
    raise OutOfDiskError("full")


def test_dropout_is_off_wherever_a_model_keeps_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[0].attention_dropout = 0.3
    disable_dropout(model)
    assert model[1].p == model[0].attention_dropout == 0.0
