"""A run whose guard rolls back and stops, on fake rooms: what is loaded, what is trained again, what is left behind."""

import json
import math

import pytest

from driven_run import cast_of, drive, latest
from opd_ray.config import from_dict
from opd_ray.run.summary import Summary

NAN = {"loss": math.nan}
ROLLBACK = {"level": "rollback"}


@pytest.fixture(autouse=True)
def one_loss_is_enough(monkeypatch):
    """A single loss that is not finite is a row of them, and costs a rollback."""
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 1)


@pytest.fixture
def stumble(tmp_path):
    """Runs six steps, of which ``step`` has no finite loss ``times`` times; returns (summary, stopped, log, run
    directory)."""

    def stumble(step, times, **more):
        cast = cast_of(metrics={"rollout_log_every_steps": 0}, **more)
        cast.learner_metrics[step] = [NAN] * times + [{}]
        return *drive(tmp_path, cast), cast.log, tmp_path

    return stumble


def test_a_resumed_run_has_the_summary_of_the_whole(stumble):
    _, _, _, run_dir = stumble(3, 1, guard=ROLLBACK)
    kept = latest(run_dir).state["summary"]
    again = Summary(kept)
    assert [event["level"] for event in again.state()["guard_events"]] == ["rollback"]
    assert again.state()["trained_tokens"] == kept["trained_tokens"] > 0
    assert again.result(from_dict({}), None)["weight_sync_s"] == {"p50": 0.0, "max": 0.0}, "no step was left to do"


def trained(log):
    return [event[1] for event in log if event[0] == "train_step"]


def order_of(log, *kinds):
    return [event[0] for event in log if event[0] in kinds]


def test_a_rollback_goes_on_from_the_last_healthy_checkpoint(stumble):
    summary, stopped, log, run_dir = stumble(3, 1, guard=ROLLBACK)
    assert trained(log) == [0, 1, 2, "not finite", 2, 3, 4, 5]
    assert order_of(log, "abandon", "restore", "begin") == ["begin", "abandon", "restore"]
    assert [event["level"] for event in summary["guard_events"]] == ["rollback"]
    assert stopped is None and summary["stopped_at"] is None
    assert latest(run_dir).step == 6
    lines = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 3, 4, 5, 6]


def test_without_a_healthy_checkpoint_it_begins_again(stumble):
    _, _, log, _ = stumble(1, 1, guard=ROLLBACK)
    assert trained(log) == [0, "not finite", 0, 1, 2, 3, 4, 5]
    assert order_of(log, "restore", "begin") == ["begin", "begin"]


def test_the_stronger_setting_survives_a_kill_after_the_rollback(stumble):
    _, _, _, run_dir = stumble(3, 1, guard=ROLLBACK)
    # The checkpoint that was gone back to is gone by now (keep=1); every later one carries the rollback on.
    assert latest(run_dir).state["guard"]["num_rollbacks"] == 1


def test_after_its_last_rollback_the_guard_stops_the_run_with_its_results(stumble):
    summary, stopped, log, run_dir = stumble(3, 99, guard=ROLLBACK | {"level": "stop", "max_rollbacks": 2})
    assert trained(log) == [0, 1, 2, "not finite", 2, "not finite", 2, "not finite"]
    assert [event["level"] for event in summary["guard_events"]] == ["rollback", "rollback", "stop"]
    assert "step 4, stop: non_finite_loss" in stopped and str(run_dir) in stopped
    assert summary["stopped_at"] == 4
    assert (run_dir / "student" / "weights.txt").read_bytes() == b"w"


def test_a_single_step_without_a_finite_loss_costs_no_rollback(stumble, monkeypatch):
    """The bug: it had changed no weights, and the run lost all it had learnt since the last checkpoint."""
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 3)
    summary, stopped, log, _ = stumble(3, 1, guard=ROLLBACK)
    assert trained(log) == [0, 1, 2, "not finite", 4, 5]
    assert [event["level"] for event in summary["guard_events"]] == ["warn"] and stopped is None
