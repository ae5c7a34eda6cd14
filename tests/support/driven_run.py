"""A whole run on fake workers: the real driver, supervisor, delivery, keeper and shelf."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa

import fake_ray
from fake_rooms import Cast, golden_batch, stream
from fake_workers import FakeGenerator, FakeLearner, FakeScorer
from known_models import TINY
from opd_ray.config import from_dict
from opd_ray.placement.session import Session
from opd_ray.run.driver import Driver
from opd_ray.snapshots import Lease, Shelf, Storage

FACTS: Any = SimpleNamespace(
    eos_token_ids=(0,),
    max_context_tokens=64,
    max_prompt_tokens=4,
    num_prompts=10,
    sizes=defaultdict(lambda: TINY),
    prompts={"rows": 8, "used": 8},
    golden={"rows": 5, "used": 5},
    servers={},
    translations={},
    data=SimpleNamespace(
        prompt_stream=lambda attempt: stream(),
        problem_streams=lambda: defaultdict(stream),
        remarks=list,
        golden=SimpleNamespace(
            report={"rows": 5, "used": 5},
            pairs=None,
            mix=None,
            hand_over=lambda: golden_batch(5),
            asked=pa.record_batch({"prompt": ["?"] * 5, "answer": [""] * 5}),
        ),
    ),
)

SMALL = {
    "learner": {"steps": 6},
    "buffer": {"prompts_per_step": 2, "golden_per_prompt": 0},
    "loss": {"golden": {"coef": 0}, "reference": {"coef": 0}},
    "data": {"golden": None},
    "evaluation": {"num_problems": 0, "every_steps": 0},
    "metrics": {"rollout_log_every_steps": 1},
    "checkpoint": {"every_steps": 2, "keep": 1},
    "guard": {"level": "off"},
}


def cast_of(prepare: Callable[[Cast], None] = lambda cast: None, **changes: Any) -> Cast:
    """The workers of six steps of two prompts; ``changes`` go into the sections of the configuration."""
    sections = {name: SMALL.get(name, {}) | changes.get(name, {}) for name in SMALL.keys() | changes.keys()}
    cast = Cast(from_dict(sections))
    prepare(cast)
    return cast


def drive(
    run_dir: Path,
    cast: Cast,
    *,
    facts: Any = FACTS,
    resume: bool = False,
    storage: Storage | None = None,
    observers: tuple[Any, ...] = (),
    meanwhile: Callable[[asyncio.Event], Awaitable[None]] | None = None,
    most_s: float = 100_000.0,
) -> tuple[dict[str, Any], str | None]:
    """Runs to the end; returns the summary and why the guard stopped it. ``meanwhile`` runs beside the run, and gets
    the event that a signal would set. ``storage``: of the checkpoints, by default in the run directory."""

    async def whole() -> tuple[dict[str, Any], str | None]:
        stopping = asyncio.Event()

        @contextlib.contextmanager
        def signals() -> Iterator[asyncio.Event]:
            yield stopping

        with contextlib.ExitStack() as stack:
            for name, value in (
                ("placement.launch.start_rooms", lambda *_, **__: cast.rooms()),
                ("run.driver.FileCalls", lambda **_: cast.world.objects),
                ("run.golden.ray.put", cast.world.objects.put),
                ("run.driver.stop_signals", signals),
            ):
                stack.enter_context(mock.patch(f"opd_ray.{name}", value))
            place = storage or Storage(run_dir / "checkpoints")
            lease = Lease(place, "that of the test", pause=lambda _: None)
            shelf = Shelf(place, cast.world.objects, lease)
            start = shelf.check(resume=resume)
            lease.take()
            run_dir.mkdir(exist_ok=True)
            session = Session()
            driver = Driver(cast.config, facts, run_dir, session, shelf, observers, start, None)
            beside = asyncio.create_task(meanwhile(stopping)) if meanwhile else None
            try:
                return await driver.train(continued=start is not None)
            finally:
                cast.final, cast.at_the_end = cast.ranks, cast.world.living()  # before they are ended
                if beside is not None:
                    beside.cancel()
                session.close()
                lease.release()

    return fake_ray.run(whole(), most_s)


def latest(run_dir: Path) -> Any:
    """The newest checkpoint."""
    return Shelf(str(run_dir / "checkpoints"), fake_ray.Store())._latest(healthy=False)  # in tests that run a loop, too


def logged(run_dir: Path) -> list[str]:
    """The ids of all rollouts in the rollout log, sorted by step."""
    files = sorted((run_dir / "rollouts").glob("step-*.parquet"))
    return [name for file in files for name in json.loads(file.read_text())]


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What the run said to events.jsonl."""
    lines = (run_dir / "events.jsonl").read_text().splitlines() if (run_dir / "events.jsonl").exists() else []
    return [event for line in lines if kind in (None, (event := json.loads(line))["kind"])]


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
    assert summary["steps"] == steps and summary["engine"] == "torch"  # which auto takes for a model so small
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
