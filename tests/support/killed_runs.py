"""Runs whose drivers die, and what must hold of them whatever happened; all of it is read from the disk."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fake_learner import JOURNAL, Bigram, Row
from fake_run import Driver, Drivers

PROMPTS_PER_STEP = 4
LR = 0.1
"""Of runs with fakes."""


class Run:
    """A run directory, and the drivers that go on with it one after the other, all by the same command."""

    def __init__(self, drivers: Drivers, directory: Path, *overrides: str, fakes: bool = True) -> None:
        self._drivers, self.directory, self._fakes = drivers, directory, fakes
        self.log = directory.with_suffix(".log")
        self.checkpoints = directory / "checkpoints"
        self.overrides = [*overrides, f"checkpoint.directory={self.checkpoints}"]

    def start(self, *more: str, kill: dict[str, Any] | None = None) -> Driver:
        arguments = ["--run-dir", str(self.directory), "--auto-resume", *self.overrides, *more]
        return self._drivers.start(arguments, self.log, kill=kill, fakes=self._fakes)

    def finish(self, *more: str) -> None:
        driver = self.start(*more)
        assert driver.wait() == 0, driver.printed()

    def complete(self) -> int:
        """The step of the newest complete checkpoint; 0 for none."""
        with contextlib.suppress(FileNotFoundError):  # a driver that asks whether it can write there leaves nothing
            return max((int(path.parent.name[5:]) for path in self.checkpoints.glob("step-*/state.json")), default=0)
        return 0

    def journal(self) -> list[dict[str, Any]]:
        """What learners did, in order."""
        path = self.directory / JOURNAL
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics(self) -> list[dict[str, float]]:
        """The lines of all steps that were ever done, in order."""
        path = self.directory / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if "learner/loss" in line]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What it said of one kind, in order."""
        path = self.directory / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def losses(self) -> list[float]:
        """Of the steps that count, in order: later lines of a step replace earlier ones."""
        by_step = {line["step"]: line["learner/loss"] for line in self.metrics()}
        assert sorted(by_step) == list(range(1, len(by_step) + 1))
        return [by_step[step] for step in sorted(by_step)]

    def rollouts(self) -> list[list[dict[str, Any]]]:
        """The rollout log, step by step."""
        files = sorted((self.directory / "rollouts").iterdir())
        assert [file.name for file in files] == [f"step-{step:06d}.parquet" for step in range(1, len(files) + 1)]
        return [pq.read_table(file).to_pylist() for file in files]


def check_exactly_once(steps: list[list[dict[str, Any]]], per_step: int, num_prompts: int, max_staleness: int) -> None:
    """Every slot once and in order, every prompt once in an epoch, nothing older than it may be."""
    for step, rows in enumerate(steps, start=1):
        student = [row for row in rows if row["source"] == "student"]
        assert [row["slot"] for row in student] == list(range((step - 1) * per_step, step * per_step))
        assert {row["step"] for row in rows} == {step}
        versions = [version for row in student for version in row["weight_versions"]]
        assert step - 1 - max_staleness <= min(versions) <= max(versions) <= step - 1
    prompts = [row["prompt_id"] for rows in steps for row in rows if row["source"] == "student"]
    for start in range(0, len(prompts), num_prompts):
        assert max(Counter(prompts[start : start + num_prompts]).values()) == 1


def check_nothing_is_left_over(run: Run) -> None:
    """No file that somebody began and did not finish, and no checkpoint beyond those that are kept."""
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith((".partial", ".tmp"))]
    assert json.loads((run.checkpoints / "lease.json").read_text())["released"]
    steps = list(run.checkpoints.glob("step-*"))
    assert len(steps) == len(list(run.checkpoints.iterdir())) - 1 == 2
    for path in steps:
        written = {file["name"] for file in json.loads((path / "state.json").read_text())["body"]["files"]}
        assert {f"{path.name}/{file.name}" for file in path.iterdir()} == written | {f"{path.name}/state.json"}


def check_start(run: Run, noted: int, complete: int) -> None:
    """The learner that was started when the journal had ``noted`` lines went on from the checkpoint of step
    ``complete``, and from there step by step.

    A learner outlives its driver by a moment; what the one before did in it, after it was noted, does not count.
    """
    lines = run.journal()[noted:]
    begun = [line["process"] for line in lines if "begun" in line]
    ours = [line for line in lines if line["process"] == begun[-1]] if begun else []
    trained = [line["trained"] for line in ours if "trained" in line]
    restored = [line["restored"] for line in ours if "restored" in line]
    assert restored in ([complete], []) if complete else restored == []
    assert restored or not complete or not trained, "it trained without what it had learned"
    assert trained == list(range(complete + 1, complete + 1 + len(trained)))


def check_model(run: Run) -> None:
    """The exported model is what one gets from the rollout log alone, step by step, and so are the losses."""
    model = Bigram(LR)
    losses = [model.step([_row(row) for row in rows]) for rows in run.rollouts()]
    assert run.losses() == losses
    for name, array in model.arrays().items():
        assert (run.directory / "student" / f"{name}.bytes").read_bytes() == array.tobytes(), name
    assert model.slots == list(range(len(losses) * PROMPTS_PER_STEP))


def _row(row: dict[str, Any]) -> Row:
    return Row(row["slot"], np.array(row["response_tokens"]), np.array(row["teacher_logprobs"], np.float32))


def check_tensorboard(run: Run, steps: int) -> None:
    board = EventAccumulator(str(run.directory / "tensorboard"), {"scalars": 0})
    board.Reload()
    scalars = board.Scalars("learner/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, steps + 1))
    np.testing.assert_allclose([scalar.value for scalar in scalars], run.losses(), rtol=1e-6)
