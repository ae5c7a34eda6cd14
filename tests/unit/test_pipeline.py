"""The loop on fakes: order of events, staleness, exactly-once, failures."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import make_pipeline
from opd_ray.errors import RunError


def run(made):
    asyncio.run(asyncio.wait_for(made.pipeline.run([made.recording]), 20))
    return made


@settings(max_examples=40, deadline=None)
@given(
    max_staleness=st.integers(0, 4),
    prompts_per_step=st.integers(1, 5),
    slowest=st.sampled_from([0, 5, 60]),
    seed=st.integers(0, 100),
)
def test_staleness_stays_within_the_bound_and_every_prompt_is_trained_once(
    max_staleness, prompts_per_step, slowest, seed
):
    made = run(
        make_pipeline(max_staleness=max_staleness, prompts_per_step=prompts_per_step, slowest=slowest, seed=seed)
    )
    trained = [
        entry.meta for report in made.recording.reports for entry in report.entries if entry.meta.source == "student"
    ]
    assert sorted(meta.slot for meta in trained) == list(range(6 * prompts_per_step))
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) <= max_staleness


def test_synchronous_runs_never_train_on_old_weights():
    made = run(make_pipeline(max_staleness=0, slowest=10))
    assert [report.metrics["staleness/max"] for report in made.recording.reports] == [0] * 6


def test_with_staleness_the_rooms_overlap():
    made = run(make_pipeline(max_staleness=2))
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) == 2


def test_slots_are_freed_only_after_the_broadcast():
    """A prompt admitted for a freed slot must be sampled by the weights that the freed step made."""
    made = run(make_pipeline(max_staleness=0, prompts_per_step=3))
    admitted = {
        slot: version for name, *rest in made.log if name == "generate" for slot in rest[0] for version in rest[1:]
    }
    assert admitted == {slot: slot // 3 for slot in range(18)}


def test_a_step_is_trained_then_sent_and_received():
    made = run(make_pipeline(steps=2))
    order = [event for event in made.log if event[0] in ("train_step", "send_weights", "update_weights")]
    assert order == [
        ("train_step", 0), ("send_weights", 1), ("update_weights", 1),
        ("train_step", 1), ("send_weights", 2), ("update_weights", 2),
    ]  # fmt: skip


def test_teacher_and_reference_see_every_rollout_and_the_learner_gets_both():
    made = run(make_pipeline(steps=1))
    entries = [entry for plan in made.learner.plans for batch in plan.micro_batches for entry in batch]
    student = [entry for entry in entries if entry.meta.source == "student"]
    assert len(student) == 4
    assert all(set(entry.scores) == {"teacher", "reference"} for entry in student)
    assert all(entry.scores["teacher"] == f"teacher of {entry.rollouts}" for entry in student)
    assert sum(entry.meta.source == "golden" for entry in entries) == 4


def test_a_resumed_run_goes_on_with_the_first_prompt_that_was_not_trained():
    made = run(make_pipeline(steps=6, first_step=4))
    slots = [entry.meta.slot for report in made.recording.reports for entry in report.entries if entry.meta.slot >= 0]
    assert sorted(slots) == list(range(16, 24))
    assert [report.step for report in made.recording.reports] == [5, 6]


def test_a_failure_in_a_room_ends_the_run_with_its_own_error():
    made = make_pipeline(fail_at=2)
    with pytest.raises(RunError, match="learner lost at step 2"):
        run(made)


def test_plain_sft_runs_without_generators():
    made = run(
        make_pipeline(
            steps=2,
            prompts_per_step=0,
            buffer={"prompts_per_step": 0, "golden_per_step": 3},
            loss={"opd_coef": 0, "reference_kl_coef": 0},
        )
    )
    assert not [event for event in made.log if event[0] == "generate"]
    assert [len(plan.micro_batches[0]) for plan in made.learner.plans] == [3, 3]
