"""Whole runs on fake workers that die: every prompt is trained exactly once in the history of the final weights."""

import asyncio
import errno
import random
import re
import shlex
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import exported_metrics
import fake_ray
from driven_run import assert_whole, cast_of, die, drive, events, in_no_hurry, on_call, slow_learner
from fake_workers import FakeLearner
from opd_ray.errors import ActorError, RunError, StartFailed
from opd_ray.snapshots import Shelf, Storage
from opd_ray.status import state
from opd_ray.status.sources import status_of
from opd_ray.status.state import NoStatus

EVERYTHING = {
    "learner": {"num_ranks": 2},
    "rollout": {"num_generators": 2},
    "reference": {"update": "periodic", "num_actors": 2},
    "loss": {"reference": {"coef": 0.1}},
    "evaluation": {"num_problems": 4, "every_steps": 3, "num_problems_during": 2},
    "checkpoint": {"every_steps": 2, "memory_every_steps": 1},
}
"""Two ranks, two generators, a reference that follows the student, evaluations, checkpoints."""

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_metrics_of_steps_that_are_undone_do_not_stay_on_the_board(tmp_path, monkeypatch):
    # TensorBoard reads files in the order of their names: of those that a process opens in one second, which only fakes
    # are fast enough for, the tenth would come before the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))
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


def test_losses_that_come_again_at_the_same_step_end_the_run_however_seldom_they_are(tmp_path, monkeypatch):
    """The bug: what took longer than the window of recovery.max_restarts was tried again for ever."""
    monkeypatch.setattr("opd_ray.placement.restarts._WINDOW_S", 0.001)
    cast = cast_of(checkpoint={"every_steps": 2, "memory_every_steps": 1})
    cast.world.before = lambda actor, method: actor.die() if method == "export" else None
    with pytest.raises(RunError, match="learn: was lost 6 times without getting beyond step 6"):
        drive(tmp_path, cast)


def test_tokens_of_steps_that_were_undone_do_not_count_as_trained(tmp_path):
    quiet, _ = drive(tmp_path / "quiet", cast_of())
    cast = cast_of(checkpoint={"every_steps": 0, "memory_every_steps": 2})
    on_call(cast, "train_step", 4, die, role="learner")
    mended, _ = drive(tmp_path / "mended", cast)
    assert mended["trained_tokens"] == quiet["trained_tokens"]


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


# ---- the status ----


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["status", "metrics", "the disk"])
def test_a_status_writer_that_fails_is_told_of_and_goes_on(tmp_path, monkeypatch, broken):
    """The bug: the task that writes status.json ended without a word, and the file stayed as it was to the end."""
    cast = cast_of(slow_learner)

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device") if broken == "the disk" else KeyError("room")

    module = "opd_ray.run.status_writer"
    target = f"{module}.state.write" if broken == "the disk" else f"{module}.StatusWriter.{broken}"
    patched = monkeypatch.context()
    on_call(cast, "train_step", 2, lambda _: patched.__enter__().setattr(target, fails))
    seen = []

    def mended(_):
        patched.__exit__(None, None, None)
        seen.append(state.read(tmp_path / state.FILE).step)

    on_call(cast, "train_step", 4, mended)
    on_call(cast, "train_step", 6, lambda _: seen.append(state.read(tmp_path / state.FILE).step))
    drive(tmp_path, cast)
    assert seen == [0, 4], "it stayed, and went on when it could"
    (said,) = events(tmp_path, "status_failed")
    assert "status.json stays as it was: " in said["text"]
    assert state.read(tmp_path / state.FILE).phase == "done"
    assert_whole(cast, tmp_path)


def test_a_status_that_cannot_be_written_at_the_end_changes_nothing_about_it(tmp_path, monkeypatch):
    """The bug: what it raised took the place of the run's own outcome."""
    cast = cast_of()
    monkeypatch.setattr("opd_ray.run.status_writer.StatusWriter.status", lambda _: {}["room"])
    summary, _ = drive(tmp_path, cast)
    assert summary["steps"] == 6
    assert_whole(cast, tmp_path)


# ---- what happened ----


def test_events_go_from_the_first_second_to_the_end_also_where_nothing_happens(tmp_path):
    cast = cast_of(
        evaluation={"num_problems": 4, "every_steps": 3, "num_problems_during": 2}, checkpoint={"every_steps": 4}
    )
    drive(tmp_path, cast)
    said = events(tmp_path)
    assert [(event["kind"], event["step"]) for event in said if event["kind"] != "rooms_up"] == [
        ("start", 0),
        ("evaluation", 0),
        ("evaluation", 3),
        ("checkpoint", 4),
        ("checkpoint", 6),
        ("evaluation", 6),
        ("end", 6),
    ]
    assert said[0]["steps"] == 6 and said[0]["continued"] is False
    assert 0 <= said[2]["accuracy_sampled"] <= 1
    assert said[-1]["phase"] == "done"
    assert re.fullmatch(r"done: 6 of 6 steps: sampled accuracy 0.500 -> 0.500, \d+ s", said[-1]["text"])
    assert grepped(tmp_path) == dict.fromkeys(("guard", "broadcast", "checkpoint_failed"), 0)


def test_the_runbook_finds_what_happened_and_the_end_says_why(tmp_path):
    cast = cast_of(
        lambda cast: setattr(cast, "learner", type("Learner", (FakeLearner,), {"fail_at": 5})),
        rollout={"num_generators": 2},
    )
    on_call(cast, "update_weights", 4, die, role="student-generator")
    with pytest.raises(ActorError):
        drive(tmp_path, cast)
    found = grepped(tmp_path)
    assert found["broadcast"] == 1 and found["guard"] == 0
    end = events(tmp_path)[-1]
    assert (end["kind"], end["phase"]) == ("end", "failed") and "learner lost at step 5" in end["text"]


def grepped(run_dir):
    """Lines that each grep of the runbook finds, by kind; none of them complains."""
    runbook = (exported_metrics.GRAFANA / "README.md").read_text()
    found = {}
    for command, kind in re.findall(r"`(grep '\"kind\": \"(\w+)\"' RUN_DIR/events.jsonl)`", runbook):
        done = subprocess.run(shlex.split(command.replace("RUN_DIR", str(run_dir))), capture_output=True, text=True)
        assert done.returncode in (0, 1) and not done.stderr
        found[kind] = len(done.stdout.splitlines())
    assert len(found) == runbook.count("grep '"), "every grep was tried"
    return found


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_elsewhere_says_there_where_it_stands(tmp_path):
    where, seen = "memory://bucket/first/checkpoints", []
    with pytest.raises(NoStatus, match="first/checkpoints/status.json"):
        status_of(where)
    cast = cast_of(slow_learner)
    on_call(cast, "train_step", 3, lambda _: seen.append(status_of(where)))
    drive(tmp_path, cast, storage=Storage(where))
    assert (seen[0].step, seen[0].steps, seen[0].phase) == (1, 6, "training"), "the file comes every 20 s"
    end = status_of(where)
    assert (end.phase, end.step) == ("done", 6) and end.note.endswith(" s")
    assert Shelf(where, fake_ray.Store())._latest(healthy=False).step == 6, "checkpoints do not mind it"


# ---- anything, at any time ----


@pytest.mark.parametrize("seed", range(15))
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

    def spared(actor):
        """A group that is lost again and again before it gets anywhere ends the run, by chance as well."""
        return actor.name.endswith("-again-4")

    def fault():
        faults["left"] -= 1
        kind = rng.choice(["die", "die", "stop", "lose"])
        if kind == "lose":
            for _ in range(20):
                cast.world.objects.lose(rng.choice(list(cast.world.objects._objects)))
        else:
            getattr(rng.choice([actor for actor in cast.world.living() if not spared(actor)]), kind)()

    def at_a_call(actor, method):
        if faults["left"] > 0 and rng.random() < 0.02 and not spared(actor):
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
