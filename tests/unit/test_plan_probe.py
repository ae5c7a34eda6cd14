"""A probe: which steps it counts, when it ends, and that it leaves nothing behind. The run itself is made up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.messages import MemoryUse
from opd_ray.plan import probe as probing
from opd_ray.watch.observers import StepReport

USED = {"learn": MemoryUse(5, None)}


class FakeSession:
    """Rooms that say how much memory they used."""

    def __init__(self) -> None:
        self.closed = False

        async def memory() -> dict[str, MemoryUse]:
            assert not self.closed
            return USED

        self.up = SimpleNamespace(memory=memory)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[probing.Probe, dict[str, Any]]]:
    """A probe of a run with a first step of 30 s and others of ``step_s``."""

    def run(step_s: float, steps: int = 10_000, config: Config | None = None) -> tuple[probing.Probe, dict[str, Any]]:
        now, seen, session = [0.0], {}, FakeSession()
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(probing, "Session", lambda: session)

        def train(config: Config, run_dir: Path, *, observers: Any, session: FakeSession) -> None:
            seen.update(config=config, run_dir=run_dir, steps=0)
            run_dir.mkdir()
            with (run_dir / "metrics.jsonl").open("w") as lines:
                for step in range(1, steps + 1):
                    now[0] += 30.0 if step == 1 else step_s
                    seen["steps"] = step
                    values = {"throughput/step_s": 30.0 if step == 1 else step_s, "idle/generate": 0.5}
                    lines.write(json.dumps({"step": step, "mixture/student_rollouts": 2.0, **values}) + "\n")
                    lines.flush()
                    asyncio.run(told(observers, report(step)))

        monkeypatch.setattr("opd_ray.run.train.train", train)
        result = probing.probe(config or configs.load())
        assert session.closed and not seen["run_dir"].exists()
        return result, seen

    return run


async def told(observers: Any, report: StepReport) -> None:
    for observer in observers:
        await observer.on_step(report)


def report(step: int) -> StepReport:
    tokens = 10 + (step == 3)
    meta = SimpleNamespace(source="student", num_prompt_tokens=7, num_response_tokens=tokens, num_trained_tokens=tokens)
    return StepReport(step, [SimpleNamespace(meta=meta, scores={"teacher": None}, is_trained_on=True)] * 2, {}, None)


def test_the_first_steps_do_not_count_and_the_mean_of_the_others_does(run: Callable[..., Any]) -> None:
    """max_staleness 2: five steps fill the rooms; then it takes 20 s, and 30 steps."""
    found, seen = run(step_s=0.1)
    assert found.start_s == 30.0 and found.memory == USED
    assert seen["steps"] == pytest.approx(201, abs=1) and found.num_steps == seen["steps"] - 5
    assert found.step_s == pytest.approx(0.1)
    rooms = {room.room: room for room in found.rooms}
    assert rooms["generate"].tokens == 20 and rooms["generate"].busy_s == pytest.approx(0.05)
    assert rooms["teacher"].tokens == 20
    assert (found.step.rollouts["student"], found.step.response_tokens) == (2.0, 10)
    assert found.largest.response_tokens == 11, "that of a step that does not count otherwise"


def test_two_minutes_are_enough(run: Callable[..., Any]) -> None:
    found, seen = run(step_s=25.0)
    assert seen["steps"] == 6, "the first one and 125 s"
    assert found.num_steps == 3 and found.step_s == 25.0


def test_steps_of_ten_minutes_are_waited_for(run: Callable[..., Any]) -> None:
    """The adversary: nothing but the first step, which says nothing, within the time."""
    found, seen = run(step_s=600.0)
    assert (seen["steps"], found.step_s) == (3, 600.0)


def test_a_run_of_one_step_cannot_be_measured(run: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"ended after 1 steps; give it learner\.steps=40 or more"):
        run(step_s=1.0, steps=1)


def test_nothing_is_evaluated_and_no_checkpoint_or_curve_leaves_the_probe(run: Callable[..., Any]) -> None:
    """The adversaries: checkpoints in a bucket of the real run's, a project that everybody looks at."""
    trackers = "metrics.trackers=[tensorboard,wandb,mlflow]"
    config = configs.load(None, ["checkpoint.directory=s3://bucket/runs", "evaluation.num_problems=9", trackers])
    config = run(1.0, config=config)[1]["config"]
    assert config.checkpoint.directory is None and config.checkpoint.every_steps == 0
    assert config.evaluation_sets == {} and config.evaluation.every_steps == 0
    assert config.metrics.trackers == ()
