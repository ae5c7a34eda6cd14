"""Fakes of the rooms, to run the pipeline in milliseconds: no Ray, no models."""

import asyncio
import dataclasses
import random

from factories import golden, meta
from opd_ray.buffer import GoldenSet, ReplayBuffer
from opd_ray.config import from_dict
from opd_ray.guard import Guard
from opd_ray.messages import WeightManifest
from opd_ray.pipeline import Pipeline, Rooms
from opd_ray.prompts import PromptStream, Shuffled
from opd_ray.training import StepOutcome


class FakePool:
    """A room that keeps a shared log of what it was asked, in order."""

    num_calls = 0

    def __init__(self, room, log):
        self.room, self.log = room, log

    def __len__(self):
        return 1

    def busy_s(self):
        return 0.0


class FakeGenerators(FakePool):
    """Samples at the weights it holds; each call ends after a random number of turns of the event loop."""

    def __init__(self, log, seed=0, slowest=0, source="student"):
        super().__init__("generate", log)
        self.version, self._random, self._slowest, self._source = 0, random.Random(seed), slowest, source

    async def call(self, method, groups, sampling):
        self.log.append((method, [group.slot for group in groups], self.version, self._source, sampling))
        oldest = self.version
        for _ in range(self._random.randint(0, self._slowest)):
            await asyncio.sleep(0)
        metas = [
            meta(
                group.slot,
                rollout_id=f"{group.slot}-{i}",
                prompt_id=group.prompt_id,
                source=self._source,
                teacher=group.teacher,
                oldest_version=oldest,
                newest_version=self.version,
                mean_version=float(oldest),
                correct=group.slot % 2 == 0,
            )
            for group in groups
            for i in range(group.num_responses)
        ]
        return metas, f"{self._source} rollouts of {[group.slot for group in groups]}"

    async def call_all(self, method, manifest, deadline_s=None):
        self.log.append((method, manifest.version))
        self.version = manifest.version
        return [None]


class FakeScorers(FakePool):
    async def call(self, method, rollouts, request):
        self.log.append((self.room, rollouts, request))
        return 1, f"{self.room} of {rollouts}"


class FakeRecorder(FakePool):
    async def call(self, method, rollouts, rows):
        self.log.append((method, rollouts, rows))
        return len(rows), f"rows {rows} of {rollouts}"


class FakeLearner(FakePool):
    def __init__(self, log, fail_at=None, metrics=None):
        super().__init__("learn", log)
        self.plans, self._fail_at, self._metrics = [], fail_at, metrics or {}

    async def call_all(self, method, *args, each=None, deadline_s=None):
        if method == "train_step":
            plan = each[0]
            if plan.step == self._fail_at:
                from opd_ray.errors import RunError

                raise RunError(f"learner lost at step {plan.step}")
            self.plans.append(plan)
            self.log.append(("train_step", plan.step))
            metrics = {"loss": 1.0} | self._metrics.get(plan.step, {})
            problem = None if metrics["loss"] == metrics["loss"] else "the loss is not finite for 3-0"
            return [StepOutcome(metrics, problem)]
        self.log.append((method, *(getattr(arg, "version", arg) for arg in args)))
        return [None]


class EchoTask:
    def format_prompt(self, row, tokenizer):
        return [1, 2, 3]


class Recording:
    """An observer that keeps every report."""

    def __init__(self):
        self.reports = []

    async def on_step(self, report):
        self.reports.append(report)


def make_pipeline(
    *,
    steps=6,
    prompts_per_step=4,
    max_staleness=2,
    slowest=0,
    seed=0,
    first_step=0,
    fail_at=None,
    learner_metrics=None,
    rows=None,
    pairs=None,
    **more,
):
    """A pipeline on fakes; returns it with its log, its learner and its reports."""
    config = from_dict(
        {
            "learner": {"steps": steps},
            "buffer": {"prompts_per_step": prompts_per_step, "max_staleness": max_staleness} | more.pop("buffer", {}),
            "rollout": {"prompts_per_call": 3} | more.pop("rollout", {}),
            "evaluation": {"every_steps": 0},
            **more,
        }
    )
    log, recording = [], Recording()
    learner = FakeLearner(log, fail_at, learner_metrics)
    generators = FakeGenerators(log, seed, slowest)
    generators.version = first_step
    scorers = {role: FakeScorers(role, log) for role in (*config.teachers, "reference")}
    teacher_generators = FakeGenerators(log, seed, slowest, source="teacher")
    rooms = Rooms(generators, learner, scorers, teacher_generators, FakeRecorder("record", log))
    rows = rows or [{"id": str(i), "prompt": "p", "answer": "a"} for i in range(1000)]
    shelf = GoldenSet([golden(i) for i in range(5)], Shuffled(5, 0), pairs)
    guard = Guard(config.guard, has_golden=True, has_reference=True, configured=config.least_strength)
    order = Shuffled(len(rows), 0)
    stream = PromptStream(rows, task=EchoTask(), tokenizer=None, order=order, num_responses=1, seed=0)
    pipeline = Pipeline(
        config=config,
        rooms=rooms,
        buffer=ReplayBuffer(config.buffer.prompts_per_step, shelf),
        prompts=stream,
        problems=stream,
        stop_token_ids=(0,),
        manifest=WeightManifest(0, ("w",), ("float32",), ((1,),)),
        guard=guard,
        first_step=first_step,
    )
    return dataclasses.make_dataclass("Made", ["pipeline", "log", "learner", "recording", "config", "guard"])(
        pipeline, log, learner, recording, config, guard
    )
