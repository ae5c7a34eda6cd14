"""Whole runs on fake workers that die: every prompt is trained exactly once in the history of the final weights."""

import asyncio
import itertools
import json
import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fake_ray
from driven import cast_of, drive, events, latest, logged
from fakes import FakeGenerator, FakeLearner, FakeScorer
from opd_ray.errors import ActorError, RunError, StartFailed, Terminated

EVERYTHING = {
    "learner": {"num_ranks": 2},
    "rollout": {"num_generators": 2},
    "reference": {"update": "periodic", "num_actors": 2},
    "loss": {"reference": {"coef": 0.1}},
    "evaluation": {"num_problems": 4, "every_steps": 3, "num_problems_during": 2},
    "checkpoint": {"every_steps": 2, "memory_every_steps": 1},
}
"""Two ranks, two generators, a reference that follows the student, evaluations, checkpoints."""


def in_no_hurry(cast):
    """Everything takes a while, so that much is under way at any moment."""
    cast.generator = type("Generator", (FakeGenerator,), {"takes_s": 2.0})
    cast.scorer = type("Scorer", (FakeScorer,), {"takes_s": 0.5})
    cast.learner = type("Learner", (FakeLearner,), {"takes_s": 1.0})


def slow_learner(cast):
    """All that may be sampled ahead is sampled when a step ends."""
    in_no_hurry(cast)
    cast.learner = type("Learner", (FakeLearner,), {"takes_s": 100.0})


def assert_whole(cast, run_dir, steps=6, per_step=2):
    """In the history of the final weights each prompt was trained on once, in the step that it belongs to, and the
    rollout log says the same."""
    slots = list(range(steps * per_step))
    assert sorted(slot for rank in cast.final for slot in rank.trained) == slots
    assert [rank.steps for rank in cast.final] == [list(range(steps))] * len(cast.final)
    assert sorted(int(name.partition("-")[0]) for name in logged(run_dir)) == slots
    for step in range(1, steps + 1):
        names = json.loads((run_dir / "rollouts" / f"step-{step:06d}.parquet").read_text())
        assert {int(name.partition("-")[0]) // per_step for name in names} == {step - 1}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == steps
    assert (run_dir / "student" / "weights.txt").exists()
    weights = {tuple(sorted(actor.inside.weights)) for actor in cast.world.actors if receives(cast, actor)}
    assert len(weights) == 1, "everyone who is there has the same weights"


def receives(cast, actor):
    return actor in cast.at_the_end and actor.role in ("student-generator", "reference-scorer") and actor.inside


def on_call(cast, method, number, do, role=None, name=None):
    """Calls ``do(actor)`` at the ``number``-th call of a method of a role, or of one actor; returns whether it was."""
    count, done = itertools.count(1), []
    earlier = cast.world.before

    def before(actor, called):
        earlier(actor, called)
        if called == method and role in (None, actor.role) and name in (None, actor.name) and next(count) == number:
            done.append(actor)
            do(actor)

    cast.world.before = before
    return done


def die(actor):
    actor.die()


# ---- the loss of a group ----

LOSSES = [
    ("node", 2, "learner"),
    ("setup", 1, "learner"),
    ("setup", 2, "learner"),
    ("begin", 2, "learner"),
    ("open_transport", 1, "learner"),
    ("send_weights", 2, "learner"),
    ("send_weights", 3, "learner"),
    ("train_step", 1, "learner"),
    ("train_step", 4, "learner"),
    ("train_step", 12, "learner"),
    ("snapshot", 1, "learner"),
    ("snapshot", 6, "learner"),
    ("export", 1, "learner"),
    ("export", 2, "learner"),
    ("node", 1, "reference-scorer"),
    ("begin", 1, "reference-scorer"),
    ("connect", 1, "reference-scorer"),
    ("score", 1, "reference-scorer"),
    ("score", 4, "reference-scorer"),
    ("update_weights", 1, "reference-scorer"),
    ("update_weights", 6, "reference-scorer"),
    ("snapshot", 2, "reference-scorer"),
]


@pytest.mark.parametrize(("method", "number", "role"), LOSSES)
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_group_that_is_lost_at_any_point_starts_anew_and_nothing_is_lost_or_repeated(
    tmp_path, method, number, role, how
):
    cast = cast_of(in_no_hurry, **EVERYTHING)
    if how == "after":
        cast.world.before, cast.world.after = cast.world.after, cast.world.before
    done = on_call(cast, method, number, die, role=role)
    if how == "after":
        cast.world.before, cast.world.after = cast.world.after, cast.world.before
    summary, stopped = drive(tmp_path, cast)
    assert done, "the call came"
    assert stopped is None
    assert_whole(cast, tmp_path)
    room = {"learner": "learn", "reference-scorer": "reference"}[role]
    assert summary["restarts_by_room"] == {room: 1} and summary["restarts"] == 1


@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("learner", "setup"),
        ("learner", "begin"),
        ("learner", "restore"),
        ("learner", "open_transport"),
        ("learner", "send_weights"),
        ("reference-scorer", "begin"),
        ("reference-scorer", "restore"),
        ("reference-scorer", "connect"),
        ("reference-scorer", "update_weights"),
    ],
)
def test_a_group_that_is_lost_while_another_comes_back_is_started_once_more(tmp_path, role, method):
    cast = cast_of(in_no_hurry, **EVERYTHING)
    on_call(cast, "train_step", 4, die, name="learner-1")
    again = []

    def before(actor, called, earlier=cast.world.before):
        earlier(actor, called)
        if cast.world.named("learner-1").is_dead and (actor.role, called) == (role, method) and not again:
            again.append(actor)
            actor.die()

    cast.world.before = before
    summary, _ = drive(tmp_path, cast)
    assert again
    assert_whole(cast, tmp_path)
    assert summary["restarts"] == 2


def test_a_rank_that_is_stopped_counts_as_lost_when_it_misses_its_heartbeats(tmp_path):
    cast = cast_of(in_no_hurry, **EVERYTHING)
    on_call(cast, "train_step", 5, lambda actor: actor.stop(), role="learner")
    summary, _ = drive(tmp_path, cast, most_s=1000)
    assert_whole(cast, tmp_path)
    assert summary["restarts_by_room"] == {"learn": 1}


def test_a_lost_rank_costs_the_steps_since_the_newest_snapshot_and_no_more(tmp_path):
    cast = cast_of(learner={"steps": 9}, checkpoint={"every_steps": 0, "memory_every_steps": 3})
    on_call(cast, "train_step", 8, die, role="learner")
    drive(tmp_path, cast)
    trained = [event[1] for event in cast.log if event[0] == "train_step"]
    assert trained == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert ("restore", 6) in cast.log
    assert_whole(cast, tmp_path, steps=9)


def test_without_any_snapshot_a_lost_rank_costs_all_steps(tmp_path):
    cast = cast_of(checkpoint={"every_steps": 0, "memory_every_steps": 0})
    on_call(cast, "train_step", 4, die, role="learner")
    drive(tmp_path, cast)
    assert [event[1] for event in cast.log if event[0] == "train_step"] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert_whole(cast, tmp_path)


def test_a_snapshot_that_is_gone_from_memory_is_read_from_the_shelf(tmp_path):
    cast = cast_of(learner={"num_ranks": 2}, checkpoint={"every_steps": 2, "memory_every_steps": 1})

    def lose_all(actor):
        cast.world.objects.lose_all()
        actor.die()

    on_call(cast, "train_step", 9, lose_all, role="learner")
    drive(tmp_path, cast)
    assert events(tmp_path, "snapshot_lost")
    assert_whole(cast, tmp_path)


def test_what_was_in_the_buffer_is_not_sampled_again(tmp_path):
    """The learner is slow, so that slots of later steps are scored when it dies."""

    cast = cast_of(slow_learner, checkpoint={"every_steps": 0, "memory_every_steps": 1}, buffer={"max_staleness": 2})
    on_call(cast, "train_step", 4, die, role="learner")
    drive(tmp_path, cast)
    sampled = [slot for event in cast.log if event[0] == "generate" for slot in event[1]]
    assert [slot for slot in set(sampled) if sampled.count(slot) > 1] == [10, 11], "only what was on its way"
    assert_whole(cast, tmp_path)


def test_objects_that_are_gone_everywhere_cost_all_steps_but_not_the_run(tmp_path):
    cast = cast_of(checkpoint={"every_steps": 0, "memory_every_steps": 1})

    def lose_all(actor):
        cast.world.objects.lose_all()
        actor.die()

    on_call(cast, "train_step", 4, lose_all, role="learner")
    drive(tmp_path, cast)
    assert [event[1] for event in cast.log if event[0] == "train_step"] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert_whole(cast, tmp_path)


def test_metrics_of_steps_that_are_undone_do_not_stay_on_the_board(tmp_path):
    cast = cast_of(learner={"steps": 4}, checkpoint={"every_steps": 0, "memory_every_steps": 2})
    on_call(cast, "train_step", 4, die, role="learner")
    drive(tmp_path, cast)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("learner/loss")] == [1, 2, 3, 4]


def test_more_losses_of_a_group_than_allowed_end_the_run(tmp_path):
    cast = cast_of(recovery={"max_restarts": 2}, checkpoint={"every_steps": 2, "memory_every_steps": 1})
    cast.world.before = lambda actor, method: actor.die() if method == "train_step" else None
    with pytest.raises(RunError, match="learn: 3 workers were lost .*recovery.max_restarts is 2"):
        drive(tmp_path, cast)


def test_an_error_of_the_learner_is_not_tried_again(tmp_path):
    cast = cast_of(lambda cast: setattr(cast, "learner", type("Learner", (FakeLearner,), {"fail_at": 3})))
    with pytest.raises(ActorError, match="learner lost at step 3"):
        drive(tmp_path, cast)
    assert [event[1] for event in cast.log if event[0] == "train_step"] == [0, 1, 2]


def test_a_learner_that_cannot_start_ends_the_run(tmp_path):
    class Broken(FakeLearner):
        def __init__(self, *args):
            raise OSError("no such model")

    with pytest.raises(StartFailed, match="no such model"):
        drive(tmp_path, cast_of(lambda cast: setattr(cast, "learner", Broken)))


# ---- anything, at any time ----


@pytest.mark.parametrize("seed", range(25))
def test_random_kills_stops_and_lost_objects_lose_and_repeat_nothing(tmp_path, seed):
    """Any worker may die or stop at any call or between calls, and any object may get lost."""
    rng = random.Random(seed)
    cast = cast_of(
        in_no_hurry,
        **EVERYTHING
        | {
            "learner": {"num_ranks": 2, "steps": 10},
            "buffer": {"prompts_per_step": 4, "max_staleness": rng.randint(0, 3)},
            "checkpoint": {"every_steps": rng.choice([0, 3]), "memory_every_steps": rng.choice([0, 1, 4])},
            "recovery": {"max_restarts": 1000, "heartbeat_s": 20},
            "weights": {"timeout_s": 10},
        },
    )
    faults = {"left": 12}

    def fault():
        faults["left"] -= 1
        kind = rng.choice(["die", "die", "stop", "lose"])
        if kind == "lose":
            for _ in range(20):
                cast.world.objects.lose(rng.choice(list(cast.world.objects._objects)))
        else:
            getattr(rng.choice(cast.world.living()), kind)()

    def at_a_call(actor, method):
        if faults["left"] > 0 and rng.random() < 0.02:
            faults["left"] -= 1
            actor.die()

    cast.world.before = cast.world.after = at_a_call

    async def meanwhile(_):
        while faults["left"] > 0:
            await asyncio.sleep(rng.uniform(0, 15))
            fault()

    summary, stopped = drive(tmp_path, cast, meanwhile=meanwhile)
    assert stopped is None and summary["restarts"] > 0
    assert_whole(cast, tmp_path, steps=10, per_step=4)
    staleness = [event for event in cast.log if event[0] == "generate"]
    assert staleness and summary["staleness"]["max"] <= cast.config.buffer.max_staleness


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
    cast = cast_of(guard={"level": "rollback"}, checkpoint=checkpoint)
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
    cast = cast_of(in_no_hurry, guard={"level": "rollback"}, checkpoint={"every_steps": 2, "keep": 3})
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
