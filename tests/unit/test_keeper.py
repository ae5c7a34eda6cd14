"""Runs whose storage does not answer for a while: they train on, try again, and know when to give up."""

import asyncio
import itertools
import json

import pytest

import fake_ray
from driven_run import assert_whole, cast_of, die, drive, events, latest, logged, on_call
from fake_workers import FakeLearner, FakeRecorder
from opd_ray.errors import RunError, StorageUnavailable, Terminated
from opd_ray.snapshots import shelf

LONG = {"learner": {"steps": 40}}


def at_work(cast):
    cast.learner = type("Learner", (FakeLearner,), {"takes_s": 7.0})


class Outage:
    """Writes fail, after ``takes_s``, while ``active`` says so; counts them."""

    def __init__(self, cast, active, takes_s=0.0):
        self.failed, self.takes_s = 0, takes_s
        store = cast.world.objects
        fine = store.__call__

        class Failing(type(store)):
            async def __call__(inside, function, *args):  # noqa: N805
                if function.__name__ == "write_arrays" and active():
                    self.failed += 1
                    await asyncio.sleep(self.takes_s)
                    raise StorageUnavailable("s3://bucket/step: SLOW_DOWN; check the location")
                return await fine(function, *args)

        store.__class__ = Failing


def steps_done(cast):
    return sum(event[0] == "train_step" for event in cast.log)


def test_the_rollout_log_is_written_beside_the_next_step_and_one_at_a_time(tmp_path):
    """The bug: the learner waited for it."""
    cast = cast_of()
    at_work(cast)
    cast.recorder = type("Recorder", (FakeRecorder,), {"takes_s": 10.0})
    drive(tmp_path, cast)
    for step in (1, 2, 3):  # train_step counts from 0
        assert cast.log.index(("train_step", step)) < cast.log.index(("logged", step))
        assert cast.log.index(("logged", step)) < cast.log.index(("logged", step + 1))
    assert_whole(cast, tmp_path)


def test_a_checkpoint_is_complete_when_the_log_has_the_steps_before(tmp_path, monkeypatch):
    """Killed in between, a run would go on behind steps that nobody logs any more."""
    cast, logs, seal = cast_of(), [], shelf.Shelf._seal
    cast.recorder = type("Recorder", (FakeRecorder,), {"takes_s": 10.0})

    def sealing(self, described, files):
        logs.append((described["step"], len(list((tmp_path / "rollouts").glob("step-*.parquet")))))
        return seal(self, described, files)

    monkeypatch.setattr(shelf.Shelf, "_seal", sealing)
    drive(tmp_path, cast)
    assert logs[-1] == (6, 6) and all(number >= step for step, number in logs)


@pytest.mark.slow
def test_while_the_storage_does_not_answer_the_run_trains_on_and_writes_the_newest_afterwards(tmp_path):
    cast = cast_of(at_work, **LONG)
    outage = Outage(cast, lambda: 5 <= steps_done(cast) < 25)
    at_the_end = []

    async def meanwhile(stopping):
        await fake_ray.until(lambda: steps_done(cast) == 24, most=100_000)
        at_the_end.append(latest(tmp_path).step)

    drive(tmp_path, cast, meanwhile=meanwhile)
    assert_whole(cast, tmp_path, steps=40)
    assert at_the_end == [4], "no step waited for the storage"
    assert latest(tmp_path).step == 40
    said = events(tmp_path, "checkpoint_failed")
    assert 5 <= len(said) == outage.failed <= 12, "every 20 s of 140"
    assert said[0]["text"].startswith("checkpoint: step 6 is tried again: s3://bucket/step: SLOW_DOWN")
    written = {event["step"] for event in events(tmp_path, "checkpoint")}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["checkpoint/skipped"] == len(set(range(2, 40, 2)) - written) > 3, "that of step 40 comes later"
    assert [int(each["text"].split()[2]) for each in said] == sorted({each["step"] // 2 * 2 for each in said})


@pytest.mark.slow
def test_the_loop_does_not_wait_for_a_write_that_has_failed_before(tmp_path):
    """The bug: at each checkpoint that was due it waited for the end of what was tried again."""
    cast = cast_of(at_work, **LONG)
    Outage(cast, lambda: steps_done(cast) >= 5, takes_s=50.0)
    times = []

    class Clock:
        async def on_step(self, report):
            times.append(asyncio.get_running_loop().time())

    with pytest.raises(RunError, match="SLOW_DOWN"):
        drive(tmp_path, cast, observers=(Clock(),))
    waits = [later - earlier > 2 * 7.0 for earlier, later in itertools.pairwise(times)]
    assert sum(waits) == 1, "for the first one that failed, as for any that is being written"
    assert steps_done(cast) == 40


def test_a_storage_that_does_not_answer_for_too_long_ends_the_run(tmp_path):
    cast = cast_of(at_work, **LONG, checkpoint={"every_steps": 2, "retry_s": 100})
    Outage(cast, lambda: steps_done(cast) >= 5)
    with pytest.raises(RunError, match="SLOW_DOWN"):
        drive(tmp_path, cast)
    assert latest(tmp_path).step == 4
    assert 19 <= steps_done(cast) <= 25, "tried again for 100 s, of 7 s a step"


@pytest.mark.slow
def test_the_last_checkpoint_is_waited_for_when_the_results_are_there(tmp_path):
    cast = cast_of(at_work)
    ends = []
    Outage(cast, lambda: steps_done(cast) == 6 and not ends)

    async def meanwhile(stopping):
        await fake_ray.until((tmp_path / "summary.json").exists, most=100_000)
        assert latest(tmp_path).step == 4
        await asyncio.sleep(300)
        ends.append(True)

    drive(tmp_path, cast, meanwhile=meanwhile)
    assert ends
    assert latest(tmp_path).step == 6


@pytest.mark.slow
def test_a_signal_during_an_outage_does_not_wait_for_the_next_try(tmp_path):
    """What is saved is the newest step, not the one that was waiting."""
    cast = cast_of(at_work, **LONG, checkpoint={"every_steps": 7, "grace_s": 15.0})
    back = []
    Outage(cast, lambda: not back)

    async def meanwhile(stopping):
        await fake_ray.until(lambda: events(tmp_path, "checkpoint_failed"), most=100_000)
        back.append(True)
        stopping.set()

    with pytest.raises(Terminated, match="the checkpoint of step 8 is written"):
        drive(tmp_path, cast, meanwhile=meanwhile)
    assert latest(tmp_path).step == 8


@pytest.mark.slow
def test_a_learner_that_is_lost_during_an_outage_comes_back_from_memory(tmp_path):
    cast = cast_of(at_work, **LONG, checkpoint={"every_steps": 5, "memory_every_steps": 1})
    Outage(cast, lambda: steps_done(cast) < 30)
    on_call(cast, "train_step", 18, die, role="learner")
    drive(tmp_path, cast)
    assert_whole(cast, tmp_path, steps=40)
    assert [event[1] for event in cast.log if event[0] == "train_step"] == [*range(17), *range(17, 40)]
    assert len(logged(tmp_path)) == 80


def test_a_signal_while_the_last_checkpoint_is_waited_for_ends_the_run_as_signals_do(tmp_path):
    """The bug: one of two that waited got the failure; the run ended as if it were saved, or with exit code 1."""
    cast = cast_of(at_work, checkpoint={"every_steps": 6, "grace_s": 60.0})
    Outage(cast, lambda: True)

    async def meanwhile(stopping):
        await fake_ray.until((tmp_path / "summary.json").exists, most=100_000)
        await asyncio.sleep(5)
        stopping.set()

    with pytest.raises(Terminated, match="there is no checkpoint"):
        drive(tmp_path, cast, meanwhile=meanwhile)


def test_a_signal_while_the_last_checkpoint_is_being_written_fails_no_run_that_is_saved(tmp_path):
    cast = cast_of(at_work, checkpoint={"every_steps": 6, "grace_s": 60.0})
    back = []
    Outage(cast, lambda: not back)

    async def meanwhile(stopping):
        await fake_ray.until((tmp_path / "summary.json").exists, most=100_000)
        await asyncio.sleep(5)
        back.append(True)
        stopping.set()

    drive(tmp_path, cast, meanwhile=meanwhile)
    assert latest(tmp_path).step == 6


@pytest.mark.slow
def test_a_storage_that_hangs_is_one_that_does_not_answer(tmp_path, monkeypatch):
    """The bug: listing and sealing had no deadline, and a call that hung held the loop for ever."""
    monkeypatch.setattr(shelf, "_CALL_S", 30.0)
    cast = cast_of(at_work, **LONG)
    may_end, fine = asyncio.Event(), shelf.in_thread

    def hanging(function, *args):
        if function.__name__ == "_seal" and 5 <= steps_done(cast) < 25:
            return asyncio.ensure_future(may_end.wait())
        return fine(function, *args)

    monkeypatch.setattr(shelf, "in_thread", hanging)

    async def meanwhile(stopping):
        await fake_ray.until(lambda: steps_done(cast) == 30, most=100_000)
        assert latest(tmp_path).step == 4
        may_end.set()

    drive(tmp_path, cast, meanwhile=meanwhile)
    assert_whole(cast, tmp_path, steps=40)
    assert latest(tmp_path).step == 40
    assert "gives no answer for more than 30 s" in events(tmp_path, "checkpoint_failed")[0]["text"]


def test_before_a_learner_s_node_goes_the_newest_state_and_that_after_the_step_are_on_the_shelf(tmp_path):
    """Whatever the configuration says: what is in memory may lie on that node."""
    cast = cast_of(at_work, checkpoint={"every_steps": 0, "memory_every_steps": 2}, **LONG)

    async def meanwhile(stopping):
        await fake_ray.until(lambda: steps_done(cast) == 7, most=100_000)
        (learner,) = cast.world.living("learner")
        learner.ends_at = asyncio.get_running_loop().time() + 60
        await asyncio.sleep(60)
        learner.die(with_its_node=True)
        cast.world.objects.lose_all()

    drive(tmp_path, cast, meanwhile=meanwhile)
    assert_whole(cast, tmp_path, steps=40)
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [6, 8]
    assert ("restore", 8) in cast.log
    assert [event["worker"] for event in events(tmp_path, "node_leaves")] == ["learner-0"]
