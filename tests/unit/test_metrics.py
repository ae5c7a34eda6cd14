"""Metrics of rollouts, on cases one can count by hand, and what stays on the metrics port while a run is slow."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest

from opd_ray.watch import metrics
from opd_ray.watch.metrics import MetricsPort, MetricsWriter, port_name, rollout_metrics
from opd_ray.watch.observers import Metrics, StepReport
from small_messages import meta


def test_rollout_metrics_by_hand():
    metas = [
        meta(0, num_response_tokens=10, oldest_version=3, mean_version=3.0),
        meta(
            1,
            num_response_tokens=30,
            finish_reason="length",
            correct=False,
            oldest_version=2,
            mean_version=2.5,
            tail_period=4,
        ),
    ]
    metrics = rollout_metrics(metas, version=4, budget=30)
    assert metrics["rollouts/accuracy"] == 0.5
    assert metrics["rollouts/truncation_rate"] == 0.5
    assert metrics["rollouts/truncated_token_share"] == 0.75
    assert metrics["rollouts/length"] == 20
    assert metrics["rollouts/length_budget"] == 30
    assert metrics["rollouts/periodic_tail_rate"] == 0.5
    assert metrics["staleness/max"] == 2
    assert metrics["staleness/mean"] == pytest.approx(4 - (10 * 3.0 + 30 * 2.5) / 40)


def test_responses_that_the_engine_ended_are_truncated_and_tell_what_they_saved():
    metas = [
        meta(0, num_response_tokens=10),
        meta(1, num_response_tokens=12, finish_reason="repetition"),
        meta(2, num_response_tokens=25, finish_reason="repetition"),
        meta(3, num_response_tokens=30, finish_reason="length"),
    ]
    metrics = rollout_metrics(metas, version=0, budget=30)
    assert (metrics["rollouts/truncation_rate"], metrics["rollouts/repetition_stops"]) == (0.75, 0.5)
    assert metrics["rollouts/saved_tokens"] == 18 + 5


def test_what_the_horizon_cut_off_says_nothing_of_what_rollouts_come_to():
    metas = [
        meta(0, num_response_tokens=10, horizon=20, whole=True),
        meta(1, num_response_tokens=80, horizon=20, whole=True, finish_reason="length", correct=False),
        meta(2, num_response_tokens=20, horizon=20, whole=False, finish_reason="horizon", correct=False),
        meta(3, num_response_tokens=10, horizon=20, whole=False),
        meta(4, num_response_tokens=15, horizon=20, whole=False, finish_reason="repetition", correct=False),
    ]
    metrics = rollout_metrics(metas, version=0, budget=80)
    assert (metrics["rollouts/truncation_rate"], metrics["rollouts/accuracy"]) == (0.5, 0.5)
    assert (metrics["rollouts/truncated_token_share"], metrics["rollouts/length"]) == (80 / 90, 45)
    assert [metrics[f"rollouts/{name}"] for name in ("horizon", "horizon_rate", "whole")] == [20, 0.2, 2]
    assert metrics["rollouts/saved_tokens"] == 5  # not 65: it would have been cut off at 20


def test_without_student_rollouts_there_is_nothing_to_say():
    assert rollout_metrics([], version=0, budget=30) == {}


class FakeTracking:
    """What trackers are told."""

    def __init__(self):
        self.logged = []

    def begin(self, step, *, continued):
        pass

    def log(self, *call):
        self.logged.append(call)


class FakeGauge:
    """What was set, by name; ``again`` opens when a gauge is set for the ``enough``-th time."""

    def __init__(self, name, description, tag_keys):
        assert tag_keys == ("run",)
        self.name = name

    def set(self, value, tags):
        assert tags == {"run": FakeGauge.run}
        values = FakeGauge.values.setdefault(self.name, [])
        values.append(value)
        if self.name == "opd_learner_loss" and len(values) == FakeGauge.enough:
            FakeGauge.again.set()


@pytest.fixture
def gauges(monkeypatch):
    FakeGauge.values, FakeGauge.again, FakeGauge.enough, FakeGauge.run = {}, threading.Event(), 4, "runs/a"
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    return FakeGauge


def test_values_stay_on_the_port_while_a_step_takes_long(gauges):
    """Ray drops a gauge that is not set again."""
    port = MetricsPort("runs/a", 3, 10, every_s=0.01)
    port.write(4, {"learner/loss": 0.5})
    assert gauges.again.wait(30)
    port.close()
    assert set(gauges.values["opd_learner_loss"]) == {0.5}
    assert set(gauges.values["opd_run_steps"]) == {10}
    assert gauges.values["opd_run_step"][0] in (3, 4)
    assert gauges.values["opd_run_step"][-1] == 4
    assert gauges.values["opd_run_since_step_s"][-1] > 0
    number = len(gauges.values["opd_learner_loss"])
    threading.Event().wait(0.05)
    assert len(gauges.values["opd_learner_loss"]) == number, "a closed port sets nothing"


def test_the_last_values_of_a_run_are_set_when_it_ends(gauges):
    port = MetricsPort("runs/a", 0, None, every_s=3600)
    port.write(1, {"learner/loss": 0.5, "guard/events": 2.0})
    port.write(2, {"learner/loss": 0.25, "guard/events": 1.0})
    port.close()
    assert gauges.values["opd_guard_events"][-1] == 1
    assert gauges.values["opd_run_guard_events"][-1] == 3
    assert gauges.values["opd_learner_loss"][-1] == 0.25
    assert gauges.values["opd_run_step"][-1] == 2
    assert "opd_run_steps" not in gauges.values


def test_the_time_since_a_step_begins_anew_with_every_step_and_only_then(gauges, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock) * 100.0)
    port = MetricsPort("runs/a", 0, None, every_s=3600)
    port.write(1, {"learner/loss": 0.5})
    since = gauges.values["opd_run_since_step_s"][-1]
    port.write(1, {"evaluation/accuracy_greedy": 1.0})
    assert gauges.values["opd_run_since_step_s"][-1] > since, "an evaluation is no step"
    port.close()
    port = MetricsPort("runs/a", 1, None, every_s=3600)
    port.write(1, {})
    port.write(1, {})
    waited = gauges.values["opd_run_since_step_s"][-1]
    port.write(2, {"learner/loss": 0.5})
    assert gauges.values["opd_run_since_step_s"][-1] < waited
    port.close()


def test_a_pool_that_loses_its_workers_between_steps_is_seen(gauges):
    port = MetricsPort("runs/a", 0, None, every_s=3600)
    port.write(1, {"learner/loss": 0.5, "guard/events": 1.0, "pool/generate_ready": 2.0})
    port.live({"pool/generate_ready": 0.0})
    port.close()
    assert gauges.values["opd_pool_generate_ready"][-1] == 0
    assert gauges.values["opd_run_step"][-1] == 1
    assert gauges.values["opd_run_guard_events"][-1] == 1, "the step's events are not counted again"


def test_every_name_is_one_that_ray_exports():
    assert port_name("rollouts/length") == "opd_rollouts_length"
    assert port_name("pool/math-7b.v2_ready") == "opd_pool_math_7b_v2_ready"


def test_a_writer_names_its_run_and_leaves_out_what_is_not_finite(gauges, tmp_path):
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    writer = MetricsWriter(run_dir, FakeTracking(), steps=5)
    writer.write(1, {"learner/loss": 0.5, "learner/grad_norm": float("nan")})
    writer.close()
    assert json.loads((run_dir / "metrics.jsonl").read_text()) == {"step": 1, "learner/loss": 0.5}
    assert gauges.values["opd_learner_loss"][-1] == 0.5
    assert "opd_learner_grad_norm" not in gauges.values
    assert gauges.values["opd_run_steps"][-1] == 5


def test_a_line_that_a_killed_driver_did_not_finish_takes_no_other_with_it(tmp_path):
    """The bug: the first line of the resumed run was written behind the torn one, and both were lost."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    writer = MetricsWriter(tmp_path, FakeTracking(), 1, continued=True)
    writer.write(2, {"a": 3.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_nothing_is_written_for_a_run_that_has_gone_back(tmp_path):
    """A write that nobody waits for any more may come after the end of what it belongs to."""
    writer = MetricsWriter(tmp_path, tracking := FakeTracking())
    writer.write(1, {"a": 1.0})
    writer.close()
    writer.write(2, {"a": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == ['{"step": 1, "a": 1.0}']
    assert tracking.logged == [(1, {"a": 1.0}, ())]


def test_a_disk_that_hangs_does_not_hold_the_loop():
    """The bug: metrics were written on the thread of the event loop, which answers heartbeats as well."""
    gate = threading.Event()
    rooms = SimpleNamespace(all={})
    writer = SimpleNamespace(write=lambda *_: gate.wait(20))

    async def whole():
        report = StepReport(1, [], {"learner/loss": 1.0}, None)
        observer = asyncio.create_task(Metrics(writer, rooms, dict).on_step(report))
        await asyncio.sleep(0)
        gate.set()  # were it not for a thread, this would come too late
        await observer

    began = time.monotonic()
    asyncio.run(whole())
    assert time.monotonic() - began < 20
