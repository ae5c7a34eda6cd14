"""The rooms of a run with fake workers, and a pipeline in them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fake_ray import Actor, World
from fake_workers import (
    MANIFEST,
    Fabric,
    FakeGenerator,
    FakeLearner,
    FakeRecorder,
    FakeScorer,
    FakeTeacherGenerator,
    Ranks,
    Worker,
)
from opd_ray.buffer.evidence import Evidence
from opd_ray.buffer.replay import GoldenSet, ReplayBuffer
from opd_ray.config import Config, from_dict
from opd_ray.data.orders import Shuffled
from opd_ray.data.prompts import Prompts, PromptStream
from opd_ray.messages import Entry, PoolSize, RolloutMeta
from opd_ray.pipeline import Pipeline
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.status.state import Whereabouts
from opd_ray.watch.guard import Guard
from opd_ray.weights.delivery import Delivery
from small_messages import golden


class Cast:
    """The rooms of a run with fake workers; settings may be changed before ``rooms`` is called."""

    def __init__(self, config: Config) -> None:
        self.config, self.world, self.fabric = config, World(), Fabric()
        self.log: list[Any] = []
        """What the workers were asked, in order."""
        self.learner_metrics: dict[int, list[dict[str, float]]] = {}
        self.learner = FakeLearner
        self.generator: type[FakeGenerator] = FakeGenerator
        self.teacher_generator: type[FakeGenerator] = FakeTeacherGenerator
        self.scorer: type[FakeScorer] = FakeScorer
        self.recorder: type[FakeRecorder] = FakeRecorder
        self._ranks: dict[int, Ranks] = defaultdict(Ranks)
        self.final: list[FakeLearner] = []
        """The learner's ranks at the end of a run."""
        self.at_the_end: list[Actor] = []
        """All that were alive then."""

    def rooms(self) -> Rooms:
        config = self.config
        return Rooms(
            generators=self.pool(
                "generate",
                "student-generator",
                self.generator,
                config.rollout.size,
                needs_weights=True,
                calls_at_once=config.rollout.calls_at_once,
            ),
            learner=self._learner(),
            scorers={role: self._scorers(role) for role in config.scorers},
            teacher_generators=self.pool(
                "teacher_generate", "teacher-generator", self.teacher_generator, PoolSize.fixed(1)
            )
            if config.buffer.has_teacher_write
            else None,
            recorder=self.pool("record", "recorder", self.recorder, PoolSize.fixed(1)),
        )

    def pool(self, room: str, role: str, kind: type[Worker], size: PoolSize, **more: Any) -> Pool:
        spawn = self.world.spawning(role, lambda actor: kind(actor, self.fabric, self.log))
        return Pool(room, spawn, size, self.config.deadlines.generate_s, **more)

    def _scorers(self, role: str) -> Pool | Group:
        scorer = self.config.scorers[role]
        if not scorer.follows_student:
            return self.pool(role, f"{role}-scorer", self.scorer, scorer.size)
        spawn = self.world.spawning(f"{role}-scorer", lambda actor: self.scorer(actor, self.fabric, self.log))
        return Group(role, spawn, scorer.num_actors, self.config.deadlines.score_s)

    def _learner(self) -> Group:
        learner = self.config.learner
        return Group("learn", self._spawn_rank, learner.num_ranks, self.config.deadlines.train_s, "pings")

    def _spawn_rank(self, rank: int, restart: int) -> Any:
        ranks = self._ranks[restart]

        def make(actor: Actor) -> FakeLearner:
            one = self.learner(actor, self.fabric, self.log, ranks, rank, self.config.learner.num_ranks)
            if rank == 0:
                one.metrics = self.learner_metrics
            return one

        member = self.world.spawning("learner", make, serial=True)(rank, restart)
        ranks.actors.append(self.world.actors[-1])
        return member

    @property
    def ranks(self) -> list[FakeLearner]:
        """The learner's ranks that are alive."""
        return [actor.inside for actor in self.world.living("learner") if actor.inside is not None]

    @property
    def trained(self) -> list[int]:
        """The slots whose training led to the learner's weights."""
        return sorted(slot for rank in self.ranks for slot in rank.trained)

    def golden(self, number: int) -> list[Entry]:
        metas, batch = golden_batch(number)
        ref = self.world.objects.put(batch)
        return [Entry(meta, row, ref) for row, meta in enumerate(metas)]


def golden_batch(number: int) -> tuple[list[RolloutMeta], pa.RecordBatch]:
    batch = pa.record_batch({"slot": [-1] * number, "source": ["golden"] * number})
    return [golden(row).meta for row in range(number)], batch


class FakeRenderer:
    def prompt(self, row: Any, solution: str | None = None) -> list[int]:
        return [1, 2, 3]


class Recording:
    """An observer that keeps every report."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    async def on_step(self, report: Any) -> None:
        self.reports.append(report)


ROWS = [{"id": str(i), "prompt": "p", "answer": "a"} for i in range(1000)]


def stream(rows: Sequence[Any] = ROWS, order: Shuffled | None = None) -> PromptStream:
    renderer: Any = FakeRenderer()
    return PromptStream(Prompts("rows", rows, renderer), order=order)


@dataclasses.dataclass
class Made:
    pipeline: Pipeline
    cast: Cast
    rooms: Rooms
    delivery: Delivery
    recording: Recording
    config: Config
    guard: Guard

    @property
    def log(self) -> list[Any]:
        return self.cast.log

    @property
    def learner(self) -> FakeLearner:
        return self.cast.ranks[0]

    def held(self, ref: Any) -> list[dict[str, Any]]:
        """The rows of a payload."""
        return self.cast.world.objects.get(ref).to_pylist()


async def make_pipeline(
    *,
    steps: int = 6,
    prompts_per_step: int = 4,
    max_staleness: int = 2,
    slowest: int = 0,
    seed: int = 0,
    first_step: int = 0,
    restored: Mapping[int, Sequence[Entry]] | None = None,
    fail_at: int | None = None,
    learner_metrics: Mapping[int, Mapping[str, float]] | None = None,
    rows: Sequence[Any] = ROWS,
    pairs: Mapping[str, int] | None = None,
    prepare: Callable[[Cast], None] = lambda cast: None,
    **more: Any,
) -> Made:
    """A pipeline in rooms that are up, its weights sent once."""
    config = from_dict(
        {
            "learner": {"steps": steps} | more.pop("learner", {}),
            "buffer": {"prompts_per_step": prompts_per_step, "max_staleness": max_staleness} | more.pop("buffer", {}),
            "rollout": {"prompts_per_call": 3} | more.pop("rollout", {}),
            "evaluation": {"every_steps": 0} | more.pop("evaluation", {}),
            **more,
        }
    )
    cast = Cast(config)
    changes = {"slowest": slowest, "seed": seed}
    cast.generator = type("Generator", (FakeGenerator,), changes)
    cast.teacher_generator = type("TeacherGenerator", (FakeTeacherGenerator,), changes)
    cast.learner = type("Learner", (FakeLearner,), {"fail_at": fail_at})
    cast.learner_metrics = {step: [dict(metrics)] for step, metrics in (learner_metrics or {}).items()}
    prepare(cast)
    rooms = cast.rooms()
    guard = Guard(
        config.guard,
        has_golden=True,
        has_reference=True,
        configured=config.least_strength,
        student_coef=config.loss.student.coef,
        steps_ahead=config.buffer.max_staleness,
    )
    prompts = stream(rows, Shuffled(len(rows), 0))
    delivery = Delivery(config, rooms, lambda *_, **__: None)
    delivery.manifest = MANIFEST
    made = Made(
        Pipeline(
            config=config,
            rooms=rooms,
            buffer=ReplayBuffer(config.buffer.prompts_per_step, GoldenSet(cast.golden(5), Shuffled(5, 0), pairs)),
            prompts=prompts,
            problems=defaultdict(lambda: stream(rows)),
            stop_token_ids=(0,),
            delivery=delivery,
            guard=guard,
            first_step=first_step,
            restored=restored or {},
            where=Whereabouts(),
            say=lambda *_, **__: None,
            evidence=Evidence(config) if config.buffer.evidence else None,
        ),
        cast,
        rooms,
        delivery,
        Recording(),
        config,
        guard,
    )
    await asyncio.gather(*(group.up(10) for group in (rooms.learner, *rooms.followers.values())))
    await asyncio.gather(*(pool.up(10) for pool in rooms.pools))
    for rank in cast.ranks:
        rank.steps = list(range(first_step))
    await made.pipeline.broadcast(first_step)
    cast.log.clear()
    return made
