"""Runs on fake workers that are ended by a signal, or fail, and go on: what is saved, and what comes of it."""

import asyncio
import contextlib
import errno
import json
import time
from unittest import mock

import pytest

import fake_ray
from driven_run import assert_whole, cast_of, die, drive, in_no_hurry, latest, logged, on_call, slow_learner
from opd_ray.errors import GuardStopped, RunError, Terminated, Unwritable
from opd_ray.report.runs import read_run
from opd_ray.run import train as running
from opd_ray.status import reasons, state
from opd_ray.watch import metrics

IN_MEMORY = {"every_steps": 0, "memory_every_steps": 1}

ROLLBACK = {"level": "rollback"}

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


def test_the_state_in_memory_is_saved_first_when_the_step_under_way_does_not_end(tmp_path):
    """The bug: the snapshot of step 4 lay in memory, and was thrown away with the step that did not end in time."""
    cast = cast_of(in_no_hurry, checkpoint={**IN_MEMORY, "grace_s": 5.0}, recovery={"heartbeat_s": 0})
    on_call(cast, "train_step", 5, lambda actor: actor.stop(), role="learner")
    text = stopped_by_a_signal(tmp_path, cast, lambda: not cast.world.named("learner-0").moves.is_set())
    assert "after step 4; the checkpoint of step 4 is written" in text
    assert text.endswith("--resume, resuming from step 4")
    again = cast_of(checkpoint=IN_MEMORY)
    drive(tmp_path, again, resume=True)
    assert [event[1] for event in again.log if event[0] == "train_step"] == [4, 5]
    assert_whole(again, tmp_path)


@pytest.mark.slow
def test_the_state_in_memory_and_then_that_after_the_step_under_way_are_saved(tmp_path):
    cast = cast_of(slow_learner, checkpoint={**IN_MEMORY, "grace_s": 1000.0})
    text = stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    assert text.endswith("resuming from step 3")
    written = [file for name, file in cast.world.objects.calls if name == "write_arrays"]
    assert [file.partition("/")[0] for file in written] == ["step-2", "step-3"]


def test_a_second_signal_waits_for_no_write(tmp_path, monkeypatch):
    """A storage that hangs: the first waits for it as long as the grace time lasts, the second ends the run at once."""
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 2, "grace_s": 1000.0})
    writing, at = asyncio.Event(), []

    async def hang(self, function, *args):
        if function.__name__ == "write_arrays":
            writing.set()
            await asyncio.Event().wait()
        return await call(self, function, *args)

    call = fake_ray.Store.__call__
    monkeypatch.setattr(fake_ray.Store, "__call__", hang)

    async def meanwhile(stopping):
        await writing.wait()
        [driver] = [task for task in asyncio.all_tasks() if task.get_coro().__name__ == "whole"]
        stopping.set()
        await asyncio.sleep(500.0)
        at.append(time.monotonic())
        driver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10_000.0)
        at.append(time.monotonic())

    with pytest.raises(asyncio.CancelledError):
        drive(tmp_path, cast, meanwhile=meanwhile)
    first, second = at
    assert second - first < 1.0
    assert state.read(tmp_path / state.FILE).phase == "failed"


def test_a_stopped_run_is_no_failed_one_and_says_where_it_stopped(tmp_path):
    """The bug: the status said "failed", and there was no summary."""
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 0})
    stopped_by_a_signal(tmp_path, cast, lambda: steps_done(cast) == 3)
    left = state.read(tmp_path / state.FILE)
    assert left.phase == "stopped" and left.ended
    assert reasons.explain(left).startswith("stopped after 3 of 6 steps: ended by a signal after step 3")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["stopped_by"], summary["stopped_at"], summary["eval_after"]) == ("signal", 3, None)
    assert not read_run(tmp_path).finished
    summary, _ = drive(tmp_path, cast_of(), resume=True)
    assert (summary["stopped_by"], summary["stopped_at"]) == (None, None)
    assert read_run(tmp_path).finished


def instead_of_a_driver(monkeypatch, ends):
    """What a run does when its driver ends so."""

    class Driver:
        def __init__(self, *_):
            pass

        async def train(self, *_, **__):
            return ends()

    monkeypatch.setattr(running, "resolve", lambda config: config)
    monkeypatch.setattr(running, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(running.preflight, "check_files", lambda config: mock.Mock(commits={}))
    monkeypatch.setattr(running.preflight, "check_resources", lambda *_: None)
    monkeypatch.setattr(running, "nodes", list)
    monkeypatch.setattr(running, "find_start", lambda *_, **__: (mock.Mock(), None))
    monkeypatch.setattr(running, "write_card", lambda *_: None)
    monkeypatch.setattr("opd_ray.run.driver.Driver", Driver)


def test_a_stopped_run_leaves_its_report(tmp_path, monkeypatch):
    """The bug: the report was written only where a run came to its last step; and one that stops before there is
    anything to report ends as any other."""
    for name, lines in (("early", ""), ("late", '{"step": 1, "learner/loss": 0.5}\n')):

        def ends(file=tmp_path / name / "metrics.jsonl", lines=lines):
            file.write_text(lines)
            raise Terminated("ended by a signal")

        instead_of_a_driver(monkeypatch, ends)
        with pytest.raises(Terminated, match="ended by a signal"):
            running.train(cast_of().config, tmp_path / name)
        assert (tmp_path / name / "report.html").exists() == bool(lines)


def test_a_run_that_the_guard_stopped_says_so_by_its_exit_code(tmp_path, monkeypatch):
    """Who tries failed jobs again (cluster/node/job) has to know it from a failure: the next would end as well."""

    def ends():
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "learner/loss": 0.5}\n')
        return {}, "the guard stopped the run"

    instead_of_a_driver(monkeypatch, ends)
    with pytest.raises(GuardStopped, match="the guard stopped the run") as caught:
        running.train(cast_of().config, tmp_path)
    assert caught.value.exit_code == 3
    assert (tmp_path / "report.html").exists()


# ---- a disk that is full ----


class FullAfter:
    """A file that takes so many writes."""

    def __init__(self, lines, most):
        self._lines, self._left = lines, most

    def write(self, text):
        if self._left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._left -= 1
        self._lines.write(text)

    def close(self):
        self._lines.close()


def test_a_full_disk_ends_the_run_in_one_line_and_with_the_state_in_memory(tmp_path, monkeypatch):
    """The bug: a bare OSError, and all steps since the last checkpoint were lost."""
    with monkeypatch.context() as patched:
        fine = metrics._open_lines
        patched.setattr(metrics, "_open_lines", lambda path: FullAfter(fine(path), 4))
        with pytest.raises(RunError) as caught:
            drive(tmp_path, cast_of(checkpoint=IN_MEMORY))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/metrics.jsonl cannot be written (No space left on device); free some space")
    assert text.endswith(f"step 4 is written; go on with --run-dir {tmp_path} --resume, resuming from step 4")
    left = state.read(tmp_path / state.FILE)
    assert (left.phase, left.note) == ("failed", text)
    again = cast_of(checkpoint=IN_MEMORY)
    drive(tmp_path, again, resume=True)
    assert_whole(again, tmp_path)


def test_a_full_disk_is_the_same_failure_wherever_it_shows(tmp_path):
    """The rollout log in its actor, beside which the run went on, and the summary."""
    cast = cast_of(checkpoint=IN_MEMORY)
    path = tmp_path / "full" / "summary.json"  # a run takes away the one that it finds
    on_call(cast, "export", 1, lambda _: path.symlink_to("/dev/full"))
    with pytest.raises(Unwritable, match=r"summary.json cannot be written \(No space left on device\)"):
        drive(path.parent, cast)
    cast = cast_of(checkpoint=IN_MEMORY)

    def full(_):
        raise Unwritable("step-3.parquet cannot be written (No space left on device)")

    on_call(cast, "write", 3, full)
    with pytest.raises(Unwritable, match="step-3.parquet .*resuming from step 3"):
        drive(tmp_path / "rollouts", cast)


def test_a_full_disk_that_has_the_checkpoints_as_well_is_said_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_open_lines", lambda path: FullAfter(path.open("a"), 4))
    cast = cast_of(checkpoint=IN_MEMORY)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    on_call(cast, "train_step", 4, lambda _: monkeypatch.setattr("opd_ray.snapshots.storage.os.fsync", full))
    with pytest.raises(Unwritable, match="there is no checkpoint; go on with .* resuming from step 0"):
        drive(tmp_path, cast)
    assert "the state could not be saved: " in capsys.readouterr().out


# ---- checkpoints and resuming ----


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_a_learner_lost_just_after_a_rollback_goes_on_with_the_stronger_setting(tmp_path, checkpoint, monkeypatch):
    """The bug: the state in memory that the run had gone back to did not know of the rollback."""
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 1)
    cast = cast_of(guard=ROLLBACK | {"min_horizon": 1}, checkpoint=checkpoint)
    cast.learner_metrics[4] = [{"loss": float("nan")}, {}]
    on_call(cast, "train_step", 6, die, role="learner")  # the first after the rollback
    summary, stopped = drive(tmp_path, cast)
    assert stopped is None and [event["level"] for event in summary["guard_events"]] == ["rollback"]
    masks = [plan.coefficients.mask_truncated_tails for plan in cast.final[0].plans]
    assert masks == [True, True], "the notch that the guard had taken"
    sampled = [event for event in cast.log if event[0] == "generate" and 10 in event[1]]
    assert len(sampled) == 3, "rollouts of the attempt that went astray are not used again"
    assert_whole(cast, tmp_path)


def test_a_signal_after_a_rollback_speaks_of_the_checkpoint_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 1)
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
