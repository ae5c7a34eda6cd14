"""Runs on fake workers that are ended by a signal, or fail, and go on: what is saved, and what comes of it."""

import asyncio
import json

import pytest

import fake_ray
from driven import assert_whole, cast_of, die, drive, in_no_hurry, latest, logged, on_call, slow_learner
from opd_ray.errors import RunError, Terminated

ROLLBACK = {"level": "rollback", "max_non_finite_steps": 1}

# ---- signals ----


def stopped_by_a_signal(run_dir, cast, when, **more):
    async def meanwhile(stopping):
        await fake_ray.until(when, most=100_000)
        stopping.set()

    with pytest.raises(Terminated) as caught:
        drive(run_dir, cast, meanwhile=meanwhile, **more)
    return str(caught.value)


def steps_done(cast):
    return sum(event[0] == "train_step" for event in cast.log)


def test_on_a_signal_the_step_under_way_is_finished_and_saved(tmp_path):
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 0})
    text = stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    assert "after step 3; the checkpoint of step 3 is written; go on with --run-dir" in text
    assert latest(tmp_path).step == 3
    assert Terminated.exit_code == 143
    again = cast_of(in_no_hurry, checkpoint={"every_steps": 0})
    drive(tmp_path, again, resume=True)
    assert [event[1] for event in again.log if event[0] == "train_step"] == [3, 4, 5]
    assert_whole(again, tmp_path)


def test_what_is_saved_already_is_not_saved_again(tmp_path):
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 1})
    text = stopped_by_a_signal(tmp_path, cast, lambda: (tmp_path / "checkpoints/step-2/state.json").exists())
    assert "the checkpoint of step 2 is written" in text or "the checkpoint of step 3 is written" in text
    written = [name for name, _ in cast.world.objects.calls if name == "write_arrays"]
    assert len(written) == latest(tmp_path).step


def test_a_signal_while_the_rooms_come_up_ends_the_run_at_once(tmp_path):
    cast = cast_of(checkpoint={"every_steps": 1})
    cast.world.starting = lambda actor: actor.may_start.clear()
    text = stopped_by_a_signal(tmp_path, cast, lambda: True, most_s=500)
    assert "after step 0; there is no checkpoint" in text


def test_when_the_grace_time_is_over_the_run_ends_with_what_is_saved(tmp_path):
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 2, "grace_s": 5.0}, recovery={"heartbeat_s": 0})
    on_call(cast, "train_step", 5, lambda actor: actor.stop(), role="learner")
    text = stopped_by_a_signal(tmp_path, cast, lambda: not cast.world.named("learner-0").moves.is_set())
    assert "ended by a signal after step 4; the checkpoint of step 4 is written" in text
    again = cast_of(checkpoint={"every_steps": 2})
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)


# ---- checkpoints and resuming ----


def test_a_resumed_run_has_all_that_was_saved(tmp_path):
    """Guard, summary, restarts, golden position, buffer: as in a run that was never interrupted."""
    sections = {
        "buffer": {"golden_per_prompt": 1.0, "max_staleness": 2},
        "loss": {"golden": {"coef": 1.0}},
        "data": {"golden": "solutions.jsonl"},
        "guard": {"level": "act"},
        "checkpoint": {"every_steps": 0, "grace_s": 1000},
    }
    cast = cast_of(slow_learner, **sections)
    on_call(cast, "generate", 3, die, role="student-generator")
    stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    saved = latest(tmp_path)
    assert saved.state["golden_position"] == 6
    assert saved.state["summary"]["restarts"] == {"generate": 1}
    assert saved.state["summary"]["trained_tokens"] == 3 * (2 + 2) * 8
    assert saved.snapshot.slots
    again = cast_of(slow_learner, **sections)
    summary, _ = drive(tmp_path, again, resume=True)
    golden = [
        entry.meta.rollout_id
        for plan in again.final[0].plans
        for batch in plan.micro_batches
        for entry in batch
        if entry.meta.source == "golden"
    ]
    whole = cast_of(slow_learner, **sections)
    drive(tmp_path / "whole", whole)
    uninterrupted = [
        entry.meta.rollout_id
        for plan in whole.final[0].plans
        for batch in plan.micro_batches
        for entry in batch
        if entry.meta.source == "golden"
    ]
    assert sorted(golden) == sorted(uninterrupted[6:])
    assert summary["trained_tokens"] == 6 * (2 + 2) * 8
    assert summary["restarts_by_room"] == {"generate": 1}
    sampled = {slot for event in again.log if event[0] == "generate" for slot in event[1]}
    assert sampled == set(range(6, 12)) - set(saved.snapshot.slots), "what was scored is not sampled again"
    names = [name for name in logged(tmp_path) if not name.startswith("golden")]
    assert sorted(int(name.partition("-")[0]) for name in names) == list(range(12))


def test_a_smaller_staleness_bound_holds_for_what_was_saved_under_a_larger_one(tmp_path):
    """The bug: rollouts from a checkpoint were trained on however old, past the max_staleness given at --resume."""
    saving = {"checkpoint": {"every_steps": 0, "grace_s": 1000}}
    cast = cast_of(slow_learner, buffer={"max_staleness": 2}, **saving)
    stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    saved = latest(tmp_path).snapshot
    old = {entry.meta.slot for entry in saved.entries if entry.meta.slot // 2 > entry.meta.oldest_version}
    assert old, "the checkpoint has rollouts of earlier weights than those of their step"
    again = cast_of(slow_learner, buffer={"max_staleness": 0}, **saving)
    drive(tmp_path, again, resume=True)
    sampled = {slot for event in again.log if event[0] == "generate" for slot in event[1]}
    assert old <= sampled
    assert_whole(again, tmp_path)


def test_a_run_on_another_number_of_ranks_goes_on(tmp_path):
    cast = cast_of(in_no_hurry, learner={"num_ranks": 3, "steps": 6}, checkpoint={"every_steps": 0})
    stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    again = cast_of(learner={"num_ranks": 2, "steps": 6})
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)


def test_steps_after_the_checkpoint_are_taken_out_of_the_log_and_trained_again(tmp_path):
    cast = cast_of(checkpoint={"every_steps": 2, "memory_every_steps": 0}, recovery={"max_restarts": 0})
    on_call(cast, "train_step", 6, die, role="learner")
    with pytest.raises(RunError, match="recovery.max_restarts is 0"):
        drive(tmp_path, cast)
    assert len(logged(tmp_path)) == 2 * 5
    again = cast_of()
    drive(tmp_path, again, resume=True)
    assert [event[1] for event in again.log if event[0] == "train_step"] == [4, 5]
    assert_whole(again, tmp_path)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 5, 6]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path, monkeypatch):
    cast = cast_of(checkpoint={"every_steps": 2})
    store = cast.world.objects
    fine = type(store).__call__

    async def full(self, function, *args):
        if function.__name__ == "write_arrays" and "step-4" in args[1]:
            raise RunError("/disk/step-4/learner: no space left on the device; free some, or ...")
        return await fine(self, function, *args)

    monkeypatch.setattr(type(store), "__call__", full)
    with pytest.raises(RunError, match="no space left on the device"):
        drive(tmp_path, cast)
    assert latest(tmp_path).step == 2
    monkeypatch.setattr(type(store), "__call__", fine)
    again = cast_of()
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)


def test_a_checkpoint_whose_objects_are_gone_is_left_out_and_the_run_goes_on(tmp_path):
    cast = cast_of(checkpoint={"every_steps": 2, "memory_every_steps": 0})
    store = cast.world.objects

    def lose(actor, method):
        if method == "snapshot" and len(actor.inside.steps) == 4:
            asyncio.get_running_loop().call_soon(store.lose_all)

    cast.world.after = lose
    drive(tmp_path, cast)
    assert_whole(cast, tmp_path)
    assert latest(tmp_path).step == 6


@pytest.mark.parametrize("checkpoint", [{"every_steps": 2}, {"every_steps": 0, "memory_every_steps": 2}])
def test_a_learner_that_is_lost_just_after_a_rollback_goes_on_with_the_stronger_setting(tmp_path, checkpoint):
    """The bug: the state in memory that the run had gone back to did not know of the rollback."""
    cast = cast_of(guard=ROLLBACK, checkpoint=checkpoint)
    cast.learner_metrics[4] = [{"loss": float("nan")}, {}]
    on_call(cast, "train_step", 6, die, role="learner")  # the first after the rollback
    summary, stopped = drive(tmp_path, cast)
    assert stopped is None and [event["level"] for event in summary["guard_events"]] == ["rollback"]
    masks = [plan.coefficients.mask_truncated_tails for plan in cast.final[0].plans]
    assert masks == [True, True], "the notch that the guard had taken"
    sampled = [event for event in cast.log if event[0] == "generate" and 10 in event[1]]
    assert len(sampled) == 3, "rollouts of the attempt that went astray are not used again"
    assert_whole(cast, tmp_path)


def test_a_signal_after_a_rollback_speaks_of_the_checkpoint_that_is_there(tmp_path):
    cast = cast_of(in_no_hurry, guard=ROLLBACK, checkpoint={"every_steps": 2, "keep": 3})
    cast.learner_metrics[3] = [{"loss": float("nan")}, {}]
    text = stopped_by_a_signal(tmp_path, cast, lambda: ("abandon", "student-generator-0") in cast.log)
    assert "the checkpoint of step 2 is written" in text
    assert latest(tmp_path).step == 2


def test_a_signal_while_a_state_is_restored_saves_the_one_in_memory(tmp_path):
    """Not what the learner holds at that moment, which may be the student of the beginning."""
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 0, "memory_every_steps": 1})
    on_call(cast, "train_step", 4, die, role="learner")
    cast.world.starting = lambda actor: actor.may_start.clear() if "again" in actor.name else None
    text = stopped_by_a_signal(tmp_path, cast, lambda: not cast.world.actors[-1].may_start.is_set())
    assert "the checkpoint of step 3 is written" in text
    again = cast_of()
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)


def test_a_learner_that_dies_while_it_is_saved_on_a_signal_leaves_what_is_saved(tmp_path):
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 2, "memory_every_steps": 0})
    on_call(cast, "snapshot", 2, die, role="learner")
    text = stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    assert "the checkpoint of step 2 is written" in text
    assert latest(tmp_path).step == 2
    again = cast_of()
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)
