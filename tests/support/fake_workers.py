"""Fake workers for every room: with real pools and groups, a whole run in milliseconds, without Ray and models.

What they pass to each other is small but real: a rollout says which slot it is of, scores say which rollouts they are
of, the learner's weights are the list of what it was trained on, and a broadcast is over when all its members took
part or its time is up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fake_ray import Actor
from opd_ray.errors import RunError, WeightSyncError
from opd_ray.messages import (
    Entry,
    MemoryUse,
    PromptGroup,
    SamplingSettings,
    ServerState,
    Spans,
    StepOutcome,
    StepPlan,
    TransferGroup,
    WeightManifest,
)
from small_messages import meta

MANIFEST = WeightManifest(0, ("w",), ("float32",), ((1,),))


class Fabric:
    """Where processes meet for something that all of them must take part in."""

    def __init__(self) -> None:
        self._there: dict[Any, dict[int, Any]] = defaultdict(dict)
        self._ports = iter(range(20_000, 60_000))

    def new_port(self) -> int:
        return next(self._ports)

    async def meet(self, what: Any, size: int, rank: int, value: Any, check: Callable[[], None]) -> list[Any]:
        """Everyone's value, by rank, when all ``size`` are there; ``check`` raises when that is not to be."""
        there = self._there[what]
        there[rank] = value
        while len(there) < size:
            check()
            await asyncio.sleep(0.05)
        return [there[each] for each in range(size)]

    async def exchange(self, group: TransferGroup, what: Any, value: Any) -> Any:
        """Rank 0's value, for every member of a group. Raises WeightSyncError when its time is up."""
        loop = asyncio.get_running_loop()
        end = loop.time() + group.timeout_s

        def check() -> None:
            if loop.time() > end:
                missing = group.world_size - len(self._there[group.port, what])
                raise WeightSyncError(f"{missing} of {group.world_size} members gave no sign of life")

        return (await self.meet((group.port, what), group.world_size, group.rank, value, check))[0]


class Worker:
    """What all of them can do."""

    def __init__(self, actor: Actor, fabric: Fabric, log: list[Any]) -> None:
        self.actor, self.fabric, self.log = actor, fabric, log
        self.world = actor.world
        self.begun_with: list[tuple[Any, ...]] = []

    def node(self) -> str:
        return self.actor.node

    def memory(self) -> MemoryUse:
        return MemoryUse(0, None)

    def timeline(self) -> Spans:
        did, self.actor.did = self.actor.did, []
        return Spans(time.monotonic() + self.actor.ahead_s, tuple(did))

    def begin(self, *args: Any) -> None:
        self.begun_with.append(args)


class Receiver(Worker):
    """One that takes in the student's weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.group: TransferGroup | None = None
        self.version, self.weights = 0, ()
        self.whole = asyncio.Event()
        """Does it have all of a version's weights?"""
        self.whole.set()

    async def connect(self, group: TransferGroup) -> None:
        self.group = group
        await self.fabric.exchange(group, "open", None)

    async def update_weights(self, manifest: WeightManifest) -> None:
        self.log.append(("update_weights", manifest.version))
        self.whole.clear()
        self.weights = await self.fabric.exchange(self.group, manifest.version, None)
        self.version = manifest.version
        self.whole.set()


class FakeGenerator(Receiver):
    """Samples at the weights it holds; each call ends after a random number of turns of the event loop."""

    source = "student"
    slowest = 0
    seed = 0
    takes_s = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._random = random.Random(f"{self.seed} {self.actor.name}")

    async def generate(self, groups: Sequence[PromptGroup], sampling: SamplingSettings) -> tuple[Any, Any]:
        await self.whole.wait()
        self.log.append(("generate", [group.slot for group in groups], self.version, self.source, sampling))
        oldest = self.version
        for _ in range(self._random.randint(0, self.slowest)):
            await asyncio.sleep(0)
        if self.takes_s:
            await asyncio.sleep(self._random.uniform(0, 2 * self.takes_s))
        metas = [
            meta(
                group.slot,
                rollout_id=f"{group.slot}-{i}",
                prompt_id=group.prompt_id,
                source=self.source,
                teacher=group.teacher,
                oldest_version=oldest,
                mean_version=float(oldest),
                correct=group.slot % 2 == 0,
                repetitive=self.source == "teacher" and group.slot == 2,
                horizon=group.horizon,
                whole=group.horizon is None or group.probe,
            )
            for group in groups
            for i in range(group.first_response, group.first_response + group.num_responses)
        ]
        slots = [group.slot for group in groups for _ in range(group.num_responses)]
        return metas, pa.record_batch({"slot": slots, "source": [self.source] * len(slots)})

    def drain(self) -> None:
        self.log.append(("drain", self.actor.name))

    def abandon(self) -> int:
        self.log.append(("abandon", self.actor.name))
        return 0


class FakeTeacherGenerator(FakeGenerator):
    source = "teacher"


class FakeScorer(Receiver):
    """Scores of rollouts are their slots, and who says so."""

    takes_s = 0.0
    states: tuple[ServerState, ...] = (ServerState("http://one:8000", "in use", 0.0),)
    """Of servers that it asks, where it asks any."""

    async def score(self, rollouts: pa.RecordBatch, request: Any) -> tuple[int, Any]:
        await self.whole.wait()
        role = self.actor.role.removesuffix("-scorer")
        self.log.append((role, rollouts["source"][0].as_py() if len(rollouts) else None, request))
        if self.takes_s:
            await asyncio.sleep(self.takes_s)
        return len(rollouts), pa.record_batch({"of": rollouts["slot"], "by": [role] * len(rollouts)})

    def servers(self) -> tuple[ServerState, ...]:
        return self.states

    def snapshot(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        return {"version": self.version}, {"trained": np.array(self.weights, np.int64)}

    def restore(self, facts: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
        self.version, self.weights = facts["version"], tuple(arrays["trained"].tolist())


class FakeRecorder(Worker):
    takes_s = 0.0

    def select(self, rows: Sequence[tuple[int, int]], *batches: pa.RecordBatch) -> tuple[int, pa.RecordBatch]:
        self.log.append(("select", rows))
        return len(rows), pa.concat_batches([batches[at].slice(row, 1) for at, row in rows])

    async def write(
        self, directory: str, step: int, entries: Sequence[Entry], asked: Sequence[tuple[str, str]], keep: int
    ) -> int:
        """The rollout ids that a step trained on, as JSON."""
        assert len(asked) == len(entries)
        if self.takes_s:
            await asyncio.sleep(self.takes_s)
        self.log.append(("logged", step))
        Path(directory).mkdir(exist_ok=True)
        names = [entry.meta.rollout_id for entry in entries]
        (Path(directory) / f"step-{step:06d}.parquet").write_text(json.dumps(names))
        return len(names)

    def measure(self, rollouts: Any, scores: Any = None) -> dict[str, float]:
        return {}


class Ranks:
    """What the ranks of one start of the learner share."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    def check(self) -> None:
        if any(actor.is_dead for actor in self.actors):
            raise RuntimeError("Connection closed by peer")


class FakeLearner(Worker):
    """A rank. Its weights are the slots that it was trained on, in order."""

    fail_at: int | None = None
    takes_s = 0.0

    def __init__(self, actor: Actor, fabric: Fabric, log: list[Any], ranks: Ranks, rank: int, num_ranks: int) -> None:
        super().__init__(actor, fabric, log)
        self._ranks, self._rank, self._num_ranks = ranks, rank, num_ranks
        self.plans: list[StepPlan] = []
        self.trained: list[int] = []
        """Slots of this rank's share."""
        self.steps: list[int] = []
        """Every step since the beginning, that of a state that was restored included."""
        self.metrics: dict[int, list[dict[str, float]]] = {}
        """Step to what its first, second, … attempt says."""
        self._group: TransferGroup | None = None
        self._met: Counter[str] = Counter()

    async def _everyones(self, what: str, value: Any = None) -> list[Any]:
        self._met[what] += 1
        what = (id(self._ranks), what, self._met[what])
        return await self.fabric.meet(what, self._num_ranks, self._rank, value, self._ranks.check)

    def node_address(self) -> tuple[str, int]:
        return "host", self.fabric.new_port()

    async def setup(self, host: str, port: int, secret: str) -> None:
        await self._everyones("setup")

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.trained, self.steps = [], []
        self.log.append(("begin", self.actor.name))

    def manifest(self, version: int) -> WeightManifest:
        return dataclasses.replace(MANIFEST, version=version)

    async def train_step(self, plan: StepPlan) -> StepOutcome:
        if plan.step == self.fail_at:
            raise RunError(f"learner lost at step {plan.step}")
        entries = [entry for batch in plan.micro_batches for entry in batch]
        lost = await self._everyones("lost", self._lost(entries))
        if gone := tuple(sorted({name for each in lost for name in each})):
            self.plans.append(plan)
            return StepOutcome({}, lost=gone)
        if self.takes_s:
            await asyncio.sleep(self.takes_s)
        await self._everyones("step")
        self.plans.append(plan)
        attempts = self.metrics.get(plan.step) or [{}]
        metrics = {"loss": 1.0} | (attempts.pop(0) if len(attempts) > 1 else attempts[0])
        if metrics["loss"] != metrics["loss"]:
            if self._rank == 0:
                self.log.append(("train_step", "not finite"))
            self.steps.append(plan.step)
            return StepOutcome(metrics, "the loss is not finite for 3-0")
        if self._rank == 0:
            self.log.append(("train_step", plan.step))
        self.trained += [entry.meta.slot for entry in entries if entry.meta.source == "student"]
        self.steps.append(plan.step)
        return StepOutcome(metrics)

    def _lost(self, entries: Sequence[Entry]) -> list[str]:
        """Fetches every payload, and makes sure that it is the one that the meta speaks of."""
        lost, objects = [], self.world.objects
        for entry in entries:
            if not all(map(objects.holds, (entry.rollouts, *entry.scores.values()))):
                lost.append(entry.meta.rollout_id)
                continue
            row = objects.get(entry.rollouts).slice(entry.row, 1).to_pylist()[0]
            assert (row["source"], row["slot"]) == (entry.meta.source, entry.meta.slot)
            for role, scores in entry.scores.items():
                assert objects.get(scores).slice(entry.row, 1).to_pylist() == [{"of": row["slot"], "by": role}]
        return lost

    async def open_transport(self, group: TransferGroup) -> None:
        if self._rank == 0:
            self._group = group
            await self.fabric.exchange(group, "open", None)

    async def send_weights(self, manifest: WeightManifest, group: TransferGroup | None = None) -> None:
        if self._rank == 0:
            assert manifest.version == len(self.steps), "the learner's weights are of another version"
            self.log.append(("send_weights" if group is None else "welcome", manifest.version))
            if group is not None:
                await self.fabric.exchange(group, "open", None)
            await self.fabric.exchange(group or self._group, manifest.version, tuple(self.trained))

    async def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        await self._everyones("snapshot")
        arrays = {"trained": np.array(self.trained, np.int64), "steps": np.array(self.steps, np.int64)}
        return {"num_ranks": self._num_ranks}, arrays

    def restore(self, facts: Mapping[str, Any], parts: Sequence[Any]) -> None:
        arrays = [self.world.objects.get(part) for part in parts]
        self.log.append(("restore", len(arrays[0]["steps"])))
        self.steps = arrays[0]["steps"].tolist()
        self.trained = []
        for number, part in enumerate(arrays):
            if number % self._num_ranks == self._rank:
                self.trained += part["trained"].tolist()

    def export(self) -> tuple[int, dict[str, np.ndarray]]:
        self.log.append(("export", self.actor.name))
        return 1, {"weights.txt": np.frombuffer(b"w", np.uint8)} if self._rank == 0 else {}
