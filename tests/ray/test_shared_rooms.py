"""Runs one after another in the same rooms, two generators and two learner ranks: they drain, resume, and lose members.

A member that is stopped (SIGSTOP) is worse than dead: it answers nothing, and its connections stay.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private import state

from opd_ray import config as configs
from opd_ray.embedded.resolve import resolve
from opd_ray.placement.session import Session
from opd_ray.rooms import Rooms
from opd_ray.run.train import train
from opd_ray.watch.observers import StepReport
from opd_ray.weights.delivery import Delivery
from rollout_log import assert_each_prompt_once, rows

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

TIMEOUT_S, HEARTBEAT_S = 3.0, 8.0
ROOMS = [
    "rollout.engine=torch",
    "rollout.num_generators=2",
    "rollout.min_generators=1",
    "rollout.max_num_seqs=16",
    "learner.num_ranks=2",
    f"weights.timeout_s={TIMEOUT_S}",
]
SMALL = [
    *ROOMS,
    "learner.zero_stage=2",
    "loss.reference.coef=0",
    "rollout.max_response_tokens=24",
    "rollout.prompts_per_call=2",
    "buffer.prompts_per_step=8",
    "evaluation.num_problems=0",
    "evaluation.every_steps=0",
    "metrics.rollout_log_every_steps=1",
]
PATIENCE_S = 150.0
"""For what takes a few seconds on a machine that has nothing else to do."""


class OpenSession(Session):
    """Rooms that the test can look into."""

    def rooms(self, *run: Any) -> Rooms:
        self.here = super().rooms(*run)
        return self.here


@pytest.fixture(scope="module")
def session(world, ray_here: None) -> Iterator[OpenSession]:
    session = OpenSession(resolve(configs.load(None, [*world.overrides(), *SMALL])))
    yield session
    session.close()
    assert not ray.util.list_named_actors(all_namespaces=True)


@pytest.fixture
def stopped(session: OpenSession) -> Iterator[dict[str, psutil.Process]]:
    """The processes that a test stopped, by the names of their actors."""
    found: dict[str, psutil.Process] = {}
    yield found
    for process in found.values():
        if process.is_running():
            process.kill()


def run(session: OpenSession, world, run_dir: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    config = configs.load(None, [*world.overrides(), *SMALL, *overrides])
    return train(config, run_dir, session=session, **options)


def stop(name: str, stopped: dict[str, psutil.Process]) -> None:
    """Stops the process of an actor that is alive."""
    [pid] = [actor["Pid"] for actor in state.actors().values() if (actor["Name"], actor["State"]) == (name, "ALIVE")]
    stopped[name] = psutil.Process(pid)
    os.kill(pid, signal.SIGSTOP)


def assert_gone(stopped: dict[str, psutil.Process], *names: str) -> None:
    assert sorted(stopped) == sorted(names)
    _, alive = psutil.wait_procs(list(stopped.values()), timeout=60)
    assert not alive, "a stopped process was left behind"


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in kinds]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.05)


def test_draining_generators(world, session, tmp_path):
    """G = 2, the sampled-token loss per sequence, no reference."""
    options = ["rollout.in_flight=drain", "rollout.responses_per_prompt=2"]
    options += ["loss.student.divergence=k1", "loss.importance.correction=clip", "loss.reduction=sequence"]
    summary = run(session, world, tmp_path / "run", *options, "learner.steps=4")
    assert summary["method"] == "opd+mixture"
    assert summary["eval_before"] is None
    assert summary["staleness"]["max"] <= 2
    student = [row for row in rows(tmp_path / "run") if row["source"] == "student"]
    assert len(student) == 4 * 8 * 2
    assert all(len(set(row["weight_versions"])) == 1 for row in student), "a drained response has one version"
    assert all(row["reference_logprobs"] is None for row in student)


def test_columns_of_others_train_without_conversion(world, session, tmp_path):
    """Two Parquets, one with OpenR1's columns and one of conversations, are the prompts and their golden solutions."""
    solved = [json.loads(line) for line in world.golden.read_text().splitlines()]
    openr1 = [
        {
            "problem": row["prompt"],
            "solution": "a person's",
            "answer": row["answer"],
            "generations": ["#", row["response"]],
            "correctness_math_verify": [False, True],
            "is_reasoning_complete": [True, True],
            "source": "olympiads",
        }
        for row in solved[:8]
    ]
    said = (("prompt", "user"), ("response", "assistant"))
    chats = [
        {"messages": [{"role": role, "content": row[name]} for name, role in said], "answer": row["answer"]}
        for row in solved[8:]
    ]
    files = []
    for name, table in (("openr1", openr1), ("chats", chats)):
        files.append(str(tmp_path / f"{name}.parquet"))
        pq.write_table(pa.Table.from_pylist(table), files[-1])
    options = [f"data.{field}=[{', '.join(files)}]" for field in ("prompts", "golden")]
    options += ["buffer.golden_pairing=prompt", "data.golden_filter=correct"]
    summary = run(session, world, tmp_path / "run", *options, "learner.steps=2")
    assert (summary["prompts"]["used"], summary["golden"]["used"]) == (16, 16)
    trained = rows(tmp_path / "run")
    golden = {row["prompt_id"]: row["text"] for row in trained if row["source"] == "golden"}
    ids = [f"{source}-{number}" for source in (1, 2) for number in range(1, 9)]
    assert golden == dict(zip(ids, (row["response"] for row in solved), strict=True))
    assert sorted(row["prompt_id"] for row in trained if row["source"] == "student") == sorted(ids)


def test_a_resumed_run_goes_on_where_the_checkpoint_is(world, session, tmp_path):
    """The second half trains the prompts that the first half did not, at the steps that were left."""
    options = ["checkpoint.every_steps=2", "buffer.max_staleness=0"]
    run(session, world, tmp_path / "run", *options, "learner.steps=2")
    changes = ["learner.steps=4", "rollout.in_flight=abort", "learner.zero_stage=1"]
    run(session, world, tmp_path / "run", *options, *changes, resume=True)
    assert_each_prompt_once(tmp_path / "run", steps=4, prompts_per_step=8, max_staleness=0)
    resumed = [row for row in rows(tmp_path / "run") if row["source"] == "student" and row["step"] == 3]
    assert {version for row in resumed for version in row["weight_versions"]} == {2}


def test_a_broadcast_with_a_stopped_member_ends_by_its_deadline_and_the_run_goes_on_without_it(
    world, stopped, session, tmp_path, monkeypatch
):
    """One of two generators stops as version 3 is sent; the other one goes on alone until its successor has come up."""
    at, steps = 3, 10
    names: dict[int, list[str]] = {}
    broadcast = Delivery.broadcast

    async def broadcast_to_a_stopped_one(self: Delivery, version: int) -> None:
        if version == at:
            stop("student-generator-0", stopped)
        await broadcast(self, version)

    class Watch:
        """Notes who is at work after each step, and holds the run two steps later until there are two again."""

        async def on_step(self, report: StepReport) -> None:
            pool = session.here.generators
            names[report.step] = [member.name for member in pool.those("ready")]
            if report.step == at + 2:
                await until(lambda: len(pool.those("ready")) == 2)

    monkeypatch.setattr(Delivery, "broadcast", broadcast_to_a_stopped_one)
    run_dir = tmp_path / "run"
    options = [f"learner.steps={steps}", "checkpoint.every_steps=0"]
    summary = run(session, world, run_dir, *options, observers=(Watch(),))

    assert names[at - 1] == ["student-generator-0", "student-generator-1"]
    assert names[at] == names[at + 1] == ["student-generator-1"]
    assert names[steps] == ["student-generator-1", "student-generator-2"]
    took = {
        line["step"]: line["learner/weight_sync_s"]
        for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if "learner/weight_sync_s" in line
    }
    # The driver's wait for the one that is stopped, then the same broadcast to the others.
    assert TIMEOUT_S < took[at] < TIMEOUT_S + 13
    assert max(took[step] for step in took if step != at) < TIMEOUT_S
    assert summary["restarts_by_room"] == {"generate": 1}
    assert_each_prompt_once(run_dir, steps=steps, prompts_per_step=8, max_staleness=2)
    by_successor = [row for row in rows(run_dir) if row["worker"] == "student-generator-2"]
    assert by_successor, "the successor got no work"
    assert min(min(row["weight_versions"]) for row in by_successor) >= at + 2, "it began with the weights of then"
    [lost] = events(run_dir, "worker_lost")
    assert "student-generator-0" in lost["text"] and "update_weights() gave no answer" in lost["text"]
    [failed] = events(run_dir, "broadcast")
    assert failed["text"].startswith(f"weights: broadcast 1 of version {at} failed")
    assert_gone(stopped, "student-generator-0")


def test_a_stopped_scorer_is_replaced_and_a_stopped_learner_rank_goes_back_to_a_state_at_a_missed_heartbeat(
    world, stopped, session, tmp_path
):
    """Both at once, in the middle of their work; no deadline of a call is anywhere near."""
    at, steps = 5, 10

    class StopBoth:
        async def on_step(self, report: StepReport) -> None:
            if report.step == at and not stopped:
                stop("learner-1", stopped)
                stop("teacher-scorer-0", stopped)

    options = [f"learner.steps={steps}", f"recovery.heartbeat_s={HEARTBEAT_S}"]
    options += ["checkpoint.every_steps=0", "checkpoint.memory_every_steps=2"]
    run_dir = tmp_path / "run"
    summary = run(session, world, run_dir, *options, observers=(StopBoth(),))

    assert summary["restarts_by_room"] == {"learn": 1, "teacher": 1}
    assert_each_prompt_once(run_dir, steps=steps, prompts_per_step=8, max_staleness=2)
    lost = events(run_dir, "worker_lost", "group_lost")
    assert sorted((event["kind"], event["room"]) for event in lost) == [
        ("group_lost", "learn"),
        ("worker_lost", "teacher"),
    ]
    for name, event in zip(("learner-1", "teacher-scorer-0"), sorted(lost, key=lambda each: each["room"]), strict=True):
        assert f"{name} on" in event["text"]
        assert f"heartbeat gave no answer within {HEARTBEAT_S:g} s" in event["text"]
    assert_gone(stopped, "learner-1", "teacher-scorer-0")
    assert {member.name for member in session.here.learner.members} == {"learner-0-again-1", "learner-1-again-1"}
