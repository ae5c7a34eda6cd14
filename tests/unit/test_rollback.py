"""A run whose guard rolls back and stops, on fake rooms: what is loaded, what is trained again, what is left behind."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from fakes import EchoTask, FakeGenerators, FakeLearner, FakeRecorder, FakeScorers
from opd_ray import checkpoint, run
from opd_ray.config import from_dict
from opd_ray.messages import WeightManifest
from opd_ray.observers import Summary
from opd_ray.pipeline import Rooms
from opd_ray.prompts import PromptStream
from opd_ray.training import StepOutcome


class StumblingLearner(FakeLearner):
    """Its loss is not finite the first ``times`` that it trains ``step``."""

    def __init__(self, log, step, times):
        super().__init__(log)
        self._step, self._times = step, times

    async def call_all(self, method, *args, each=None, deadline_s=None):
        if method == "manifest":
            return [WeightManifest(0, ("w",), ("float32",), ((1,),))]
        if method == "train_step" and each[0].step == self._step and self._times:
            self._times -= 1
            self.log.append(("train_step", "not finite"))
            return [StepOutcome({"loss": math.nan}, "the loss is not finite for 3-0")]
        return await super().call_all(method, *args, each=each, deadline_s=deadline_s)


class FakeSession:
    def __init__(self, rooms, log):
        self._rooms, self._log = rooms, log

    async def begin(self, config, facts):
        self._log.append(("begin",))
        return self._rooms

    async def abandon(self):
        self._log.append(("abandon",))


@pytest.fixture
def stumble(tmp_path, monkeypatch):
    """Runs six steps, of which ``step`` fails ``times`` times; returns (summary, stopped, log, run directory)."""
    rows = [{"id": str(i), "prompt": "p", "answer": "a"} for i in range(100)]
    stream = PromptStream(rows, task=EchoTask(), tokenizer=None, order=None, num_responses=1, seed=0)
    monkeypatch.setattr(run, "_prompt_stream", lambda *_, **__: stream)
    monkeypatch.setattr(run, "read_prompts", lambda *_, **__: rows)

    def stumble(step, times, **more):
        log = []
        config = from_dict(
            {
                "learner": {"steps": 6},
                "buffer": {"prompts_per_step": 2, "golden_per_prompt": 0},
                "loss": {"golden": {"coef": 0}, "reference": {"coef": 0}},
                "data": {"golden": None},
                "evaluation": {"num_problems": 0, "every_steps": 0},
                "metrics": {"rollout_log_every_steps": 0},
                "checkpoint": {"every_steps": 2, "keep": 1},
                **more,
            }
        )
        scorers = {"teacher": FakeScorers("teacher", log)}
        rooms = Rooms(FakeGenerators(log), StumblingLearner(log, step, times), scorers, None, FakeRecorder("r", log))
        facts = SimpleNamespace(eos_token_ids=(0,))
        one = run._Run(config, facts, tmp_path, FakeSession(rooms, log), ())
        summary, stopped = asyncio.run(asyncio.wait_for(one.train(None, None), 20))
        return summary, stopped, log, tmp_path

    return stumble


def test_a_resumed_run_has_the_summary_of_the_whole(stumble):
    _, _, _, run_dir = stumble(3, 1, guard={"level": "rollback"})
    kept = checkpoint.latest(run_dir).state["summary"]
    again = Summary(kept)
    assert [event["level"] for event in again.state()["guard_events"]] == ["rollback"]
    assert again.state()["trained_tokens"] == kept["trained_tokens"] > 0
    assert again.result(from_dict({}), None)["weight_sync_s"] == {"p50": 0.0, "max": 0.0}, "no step was left to do"


def trained(log):
    return [event[1] for event in log if event[0] == "train_step"]


def test_a_rollback_goes_on_from_the_last_healthy_checkpoint(stumble):
    summary, stopped, log, run_dir = stumble(3, 1, guard={"level": "rollback"})
    assert trained(log) == [0, 1, 2, "not finite", 2, 3, 4, 5]
    order = [event[0] for event in log if event[0] in ("abandon", "load_checkpoint", "begin")]
    assert order == ["begin", "abandon", "load_checkpoint"]
    assert [event["level"] for event in summary["guard_events"]] == ["rollback"]
    assert stopped is None and summary["stopped_at"] is None
    assert checkpoint.latest(run_dir).step == 6
    lines = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 3, 4, 5, 6]


def test_without_a_healthy_checkpoint_it_begins_again(stumble):
    _, _, log, _ = stumble(1, 1, guard={"level": "rollback"})
    assert trained(log) == [0, "not finite", 0, 1, 2, 3, 4, 5]
    assert [event[0] for event in log if event[0] in ("load_checkpoint", "begin")] == ["begin", "begin"]


def test_the_stronger_setting_survives_a_kill_after_the_rollback(stumble):
    _, _, _, run_dir = stumble(3, 1, guard={"level": "rollback"})
    # The checkpoint that was gone back to is gone by now (keep=1); every later one carries the rollback on.
    assert checkpoint.latest(run_dir).state["guard"]["num_rollbacks"] == 1


def test_after_its_last_rollback_the_guard_stops_the_run_with_its_results(stumble):
    summary, stopped, log, run_dir = stumble(3, 99, guard={"level": "stop", "max_rollbacks": 2})
    assert trained(log) == [0, 1, 2, "not finite", 2, "not finite", 2, "not finite"]
    assert [event["level"] for event in summary["guard_events"]] == ["rollback", "rollback", "stop"]
    assert "step 4, stop: non_finite_loss" in stopped and str(run_dir) in stopped
    assert summary["stopped_at"] == 4
    assert ("export", str(run_dir / "student")) in log
