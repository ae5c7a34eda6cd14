"""The runtime's own limit: the real loop over a real Ray, in rooms whose engines only take their time.

    python jobs/bench_runtime.py [bookkeeping] [generators] [staleness] [--generators 8,64,256] [--per-call 32,1]
                                 [--steps N] [--json FILE]

Pipeline, pools, slots, buffer, plan and broadcast are the real ones, and so are every call, every reference and every
payload; only the models are missing. A generator runs eight responses at once, 20 ms a token, of log-normal lengths
(median 1,500 tokens, σ .8, cut at 8,192): 41 s in the mean, 164 s at the longest. A step has 32 of them for each
generator, so that eight generators make the 64 prompts × 4 of the paper's step, and a quarter as many golden ones.
Scorers and ranks work at so many tokens a second, one call at a time; a broadcast stops generators for 2 s. These are
seconds of devices: a run lets them pass up to a hundred times as fast, but no faster than keeps the ideal rate below
--rate, while what Ray and the driver do takes the time that it takes. Many workers of a room sit in one process, since
a machine has no room for a thousand: the driver calls each by itself all the same, as it would anywhere.

bookkeeping   rollouts a second through slots, buffer, mixture and plan, without Ray
generators    the loop by the number of generators and by rollouts a call: the driver's CPU time (all its threads, Ray's
              included) and Ray calls for each student rollout, and the share of the ideal: of the time that the
              slowest room would take alone, with all its workers always at work
staleness     the loop with eight generators by buffer.max_staleness, beside the same with 0, which is synchronous
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextlib
import dataclasses
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import ray
from rich.console import Console
from rich.table import Table

from opd_ray.buffer.mixture import NO_STRENGTH, Mixture
from opd_ray.buffer.plan import plan_step
from opd_ray.buffer.replay import GoldenSet, ReplayBuffer
from opd_ray.buffer.slots import Slots
from opd_ray.config import Config, from_dict
from opd_ray.data.orders import Shuffled
from opd_ray.data.prompts import Prompts, PromptStream
from opd_ray.messages import (
    ROLLOUT_SCHEMA,
    SCORE_SCHEMA,
    Entry,
    PoolSize,
    PromptGroup,
    RolloutMeta,
    SamplingSettings,
    ScoreRequest,
    Source,
    StepOutcome,
    StepPlan,
    TransferGroup,
    WeightManifest,
)
from opd_ray.pipeline import Pipeline
from opd_ray.placement.session import cluster
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member
from opd_ray.status.state import Whereabouts
from opd_ray.watch.guard import Guard
from opd_ray.watch.observers import StepReport
from opd_ray.weights.delivery import Delivery

PARTS = ("bookkeeping", "generators", "staleness")
MEDIAN_TOKENS, SPREAD, MOST_TOKENS, PROMPT_TOKENS = 1500, 0.8, 8192, 200
TOKEN_S, AT_ONCE, PER_STEP = 0.02, 8, 32
"""Of a generator: seconds of a token, responses that it runs at once, and responses that a step has of it."""
SCORED_PER_S, TRAINED_PER_S, BROADCAST_S = 30_000, 4_000, 2.0
"""Tokens a second of one scorer, and of one learner rank."""
GENERATORS_PER_SCORER, GENERATORS_PER_RANK = 8, 4
_FASTEST = 100
_NUM_GOLDEN = 100
_HOSTS = 3
"""Processes that the generators sit in."""


def length(seed: int) -> int:
    """Tokens of the response that is sampled with a seed."""
    return min(MOST_TOKENS, int(np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD)) + 1)


# ---- what takes the place of the models; many workers of a room sit in one of these ----


class Host:
    """What all of them can do; the first argument of every call is the number of the worker that is asked."""

    def __init__(self, second_s: float) -> None:
        """``second_s``: how long a second of the devices takes."""
        self._second_s = second_s

    async def node(self, seat: int) -> str:
        return "here"


class Generators(Host):
    """Each runs so many responses at once, in the order of the calls."""

    def __init__(self, second_s: float) -> None:
        super().__init__(second_s)
        self._free = collections.defaultdict(lambda: [0.0] * AT_ONCE)
        """Of each: when its places become free, by a clock that stands still while weights come in."""
        self._stood_s = 0.0
        self._updates: list[tuple[float, int]] = []
        """When weights came in, and their version."""

    def _now(self) -> float:
        return time.monotonic() - self._stood_s

    async def connect(self, seat: int, group: TransferGroup) -> None:
        pass

    async def update_weights(self, seat: int, manifest: WeightManifest) -> None:
        if not self._updates or self._updates[-1][1] != manifest.version:  # the first one speaks for all
            self._updates.append((self._now(), manifest.version))
            self._stood_s += BROADCAST_S * self._second_s
        await asyncio.sleep(BROADCAST_S * self._second_s)

    async def generate(
        self, seat: int, groups: Sequence[PromptGroup], sampling: SamplingSettings
    ) -> tuple[list[RolloutMeta], pa.RecordBatch]:
        owners = [(group, index) for group in groups for index in range(group.num_responses)]
        lengths = [length(group.seed + index) for group, index in owners]
        free, began, ends = self._free[seat], [], 0.0
        for tokens in lengths:
            began.append(max(self._now(), heapq.heappop(free)))
            heapq.heappush(free, began[-1] + tokens * TOKEN_S * self._second_s)
            ends = max(ends, began[-1] + tokens * TOKEN_S * self._second_s)
        while (left := ends - self._now()) > 0:
            await asyncio.sleep(left)
        metas = [
            meta_of(f"{group.slot}-{index}", group.slot, group.prompt_id, "student", tokens, self._version(at))
            for (group, index), tokens, at in zip(owners, lengths, began, strict=True)
        ]
        return metas, _rollouts(metas)

    def _version(self, at: float) -> int:
        """Of the weights that it had at a time."""
        return self._updates[bisect.bisect(self._updates, (at, -1)) - 1][1]


class Scorers(Host):
    """Each scores one batch after the other."""

    def __init__(self, second_s: float) -> None:
        super().__init__(second_s)
        self._free = collections.defaultdict(float)

    async def score(self, seat: int, rollouts: pa.RecordBatch, request: ScoreRequest) -> tuple[int, pa.RecordBatch]:
        tokens, now = len(rollouts["response_tokens"].flatten()), time.monotonic()
        takes = (tokens + PROMPT_TOKENS * len(rollouts)) / SCORED_PER_S
        self._free[seat] = max(now, self._free[seat]) + takes * self._second_s
        await asyncio.sleep(self._free[seat] - now)
        logprobs = rollouts["behaviour_logprobs"]
        return tokens, _columns(SCORE_SCHEMA, len(rollouts), rollout_id=rollouts["rollout_id"], logprobs=logprobs)


class Ranks(Host):
    """Each fetches its share of every step."""

    async def node_address(self, seat: int) -> tuple[str, int]:
        return "here", 1

    async def open_transport(self, seat: int, group: TransferGroup) -> None:
        pass

    async def send_weights(self, seat: int, manifest: WeightManifest) -> None:
        await asyncio.sleep(BROADCAST_S * self._second_s)

    async def train_step(self, seat: int, plan: StepPlan) -> StepOutcome:
        began, entries = time.monotonic(), [entry for batch in plan.micro_batches for entry in batch]
        payloads = {ref for entry in entries for ref in (entry.rollouts, *entry.scores.values())}
        await asyncio.gather(*payloads)
        takes = sum(entry.meta.num_tokens for entry in entries) / TRAINED_PER_S * self._second_s
        await asyncio.sleep(began + takes - time.monotonic())
        return StepOutcome({"loss": 1.0})


def meta_of(rollout_id: str, slot: int, prompt_id: str, source: Source, tokens: int, version: int) -> RolloutMeta:
    return RolloutMeta(
        rollout_id=rollout_id,
        slot=slot,
        prompt_id=prompt_id,
        source=source,
        num_prompt_tokens=PROMPT_TOKENS,
        num_response_tokens=tokens,
        finish_reason="length" if tokens == MOST_TOKENS else "stop",
        correct=False,
        repetitive=False,
        oldest_version=version,
        mean_version=float(version),
        mean_behaviour_logprob=-0.5,
    )


def _rollouts(metas: Sequence[RolloutMeta]) -> pa.RecordBatch:
    """A payload as large as a generator's."""
    of_meta = ("rollout_id", "slot", "prompt_id", "source", "finish_reason", "correct")
    lengths = [meta.num_response_tokens for meta in metas]
    per_token = {"response_tokens": np.int32, "behaviour_logprobs": np.float32, "weight_versions": np.int32}
    columns = {name: pa.array([getattr(meta, name) for meta in metas]) for name in of_meta}
    columns |= {name: _lists(lengths, kind) for name, kind in per_token.items()}
    return _columns(ROLLOUT_SCHEMA, len(metas), **columns)


def _lists(lengths: Sequence[int], kind: Any) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.ones(offsets[-1], kind))


def _columns(schema: pa.Schema, rows: int, **known: pa.Array) -> pa.RecordBatch:
    """Columns of a schema; those that are not ``known`` are empty lists and texts."""
    return pa.RecordBatch.from_arrays(
        [
            known[field.name]
            if field.name in known
            else pa.array([""] * rows, field.type)
            if pa.types.is_string(field.type)
            else pa.array([[]] * rows, field.type)
            for field in schema
        ],
        schema=schema,
    )


# ---- the rooms ----


class Seat:
    """The handle of one worker: what is called goes to its host. Counts the calls of all."""

    calls: Counter[str] = Counter()

    def __init__(self, host: Any, number: int) -> None:
        self._host, self._number = host, number

    def __getattr__(self, method: str) -> _Bound:
        return _Bound(getattr(self._host, method), method, self._number)


@dataclasses.dataclass
class _Bound:
    method: Any
    name: str
    number: int

    def options(self, **options: Any) -> _Bound:
        return _Bound(self.method.options(**options), self.name, self.number)

    def remote(self, *args: Any) -> Any:
        Seat.calls[self.name] += 1
        return self.method.remote(self.number, *args)


class House:
    """The processes of a run, and its rooms in them."""

    def __init__(self, config: Config, second_s: float) -> None:
        self._second_s, self._hosts = second_s, []
        generators = self._spawning("student-generator", Generators, _HOSTS)
        size, limit = config.rollout.size, config.deadlines.generate_s
        self.rooms = Rooms(
            generators=Pool(
                "generate", generators, size, limit, needs_weights=True, calls_at_once=config.rollout.calls_at_once
            ),
            learner=Group("learn", self._spawning("learner", Ranks, 1), config.learner.num_ranks, limit),
            scorers={
                role: Pool(role, self._spawning(f"{role}-scorer", Scorers, 1), scorer.size, limit)
                for role, scorer in config.scorers.items()
            },
            teacher_generators=None,
            recorder=Pool("record", self._spawning("recorder", Host, 1), PoolSize.fixed(1), limit),
        )

    def _spawning(self, role: str, kind: type[Host], processes: int) -> Callable[[int, int], Member]:
        made = ray.remote(kind).options(num_cpus=0, max_concurrency=100_000)
        hosts = [made.remote(self._second_s) for _ in range(processes)]
        self._hosts += hosts
        return lambda number, restart: Member(Seat(hosts[number % processes], number), f"{role}-{number}")

    def close(self) -> None:
        for host in self._hosts:
            ray.kill(host)


class _Tokens:
    """Renders every prompt as the same tokens."""

    def prompt(self, row: Any, solution: str | None = None) -> list[int]:
        return list(range(PROMPT_TOKENS))


def configured(generators: int, per_call: int, steps: int, max_staleness: int = 2) -> Config:
    """As jobs and recipes have it, but for a model; ``per_call``: rollouts a call, one a prompt where that is one."""
    responses = min(4, per_call)
    return from_dict(
        {
            "student": {"path": "none"},
            "teacher": {"path": "none", "num_actors": max(1, generators // GENERATORS_PER_SCORER)},
            "reference": {"num_actors": max(1, generators // GENERATORS_PER_SCORER)},
            "data": {"prompts": "none.jsonl", "golden": "none.jsonl"},
            "rollout": {
                "num_generators": generators,
                "responses_per_prompt": responses,
                "prompts_per_call": per_call // responses,
                "max_num_seqs": AT_ONCE,
                "max_response_tokens": MOST_TOKENS,
            },
            "buffer": {
                "prompts_per_step": generators * PER_STEP // responses,
                "golden_per_prompt": responses / 16,
                "max_staleness": max_staleness,
            },
            "loss": {
                "student": {"divergence": "k1"},
                "reference": {"estimator": "k3"},
            },
            "learner": {
                "steps": steps,
                "num_ranks": max(1, generators // GENERATORS_PER_RANK),
                "micro_batch_tokens": 16_384,
                "packing": True,
            },
            "evaluation": {"num_problems": 0, "every_steps": 0},
            "guard": {"level": "warn"},
        }
    )


def pipeline(config: Config, rooms: Rooms) -> Pipeline:
    """The real one; its rooms are up, and have weights."""
    metas = [_golden(number) for number in range(_NUM_GOLDEN)]
    payload = ray.put(_rollouts(metas))
    golden = [Entry(meta, row, payload) for row, meta in enumerate(metas)]
    delivery = Delivery(config, rooms, lambda *_, **__: None)
    delivery.manifest = WeightManifest(0, ("w",), ("float32",), ((1,),))
    return Pipeline(
        config=config,
        rooms=rooms,
        buffer=ReplayBuffer(config.buffer.prompts_per_step, GoldenSet(golden, Shuffled(_NUM_GOLDEN, 0))),
        prompts=prompts(config),
        problems={},
        stop_token_ids=(0,),
        delivery=delivery,
        guard=Guard(
            config.guard,
            has_golden=True,
            has_reference=True,
            configured=config.least_strength,
            rollouts_per_step=config.rollout.num_generators * PER_STEP,
        ),
        first_step=0,
        restored={},
        where=Whereabouts(),
        say=lambda *_, **__: None,
    )


def prompts(config: Config) -> PromptStream:
    rows = [{"id": str(number), "prompt": "", "answer": ""} for number in range(10_000)]
    renderer: Any = _Tokens()
    order, responses = Shuffled(len(rows), config.seed), config.rollout.responses_per_prompt
    return PromptStream(Prompts("none", rows, renderer), order=order, num_responses=responses, seed=config.seed)


def _golden(number: int) -> RolloutMeta:
    return meta_of(f"golden-{number}", -1, "", "golden", length(number), -1)


# ---- the three parts ----


def bookkeeping(steps: int) -> list[dict[str, Any]]:
    """Rollouts a second by the size of a step."""
    return [_bookkept(generators, steps) for generators in (8, 256)]


def _bookkept(generators: int, steps: int) -> dict[str, Any]:
    config = configured(generators, 32, steps)
    per_step, stream, mixture = config.buffer.prompts_per_step, prompts(config), Mixture(config)
    golden = [Entry(_golden(number), number, None) for number in range(_NUM_GOLDEN)]
    buffer = ReplayBuffer(per_step, GoldenSet(golden, Shuffled(_NUM_GOLDEN, 0)))
    slots = Slots(config.buffer.num_slots)

    async def step(number: int) -> int:
        for _ in range(per_step // config.rollout.prompts_per_call):
            taken = await slots.take(config.rollout.prompts_per_call)
            groups = [stream[slot] for slot in taken]
            owners = [(group, index) for group in groups for index in range(group.num_responses)]
            metas = [
                meta_of(f"{group.slot}-{index}", group.slot, group.prompt_id, "student", lengths[group.slot % 997], 0)
                for group, index in owners
            ]
            await buffer.add(taken, [Entry(meta, row, None) for row, meta in enumerate(metas)])
        entries = await buffer.take(number)
        entries += buffer.golden.take(mixture.at(number).num_golden, [])
        plan_step(
            entries,
            step=number,
            coefficients=mixture.coefficients(number),
            num_ranks=config.learner.num_ranks,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            packing=True,
        )
        mixture.composition(number, entries, NO_STRENGTH)
        slots.free(buffer.slots_of(number))
        return per_step * config.rollout.responses_per_prompt

    async def all_steps() -> float:
        began = time.process_time()
        done = [await step(number) for number in range(steps)]
        return sum(done) / (time.process_time() - began)

    lengths = [length(number) for number in range(997)]
    return {"rollouts_a_step": generators * PER_STEP, "rollouts_per_s": asyncio.run(all_steps())}


class Enough(Exception):
    """All steps that are measured were done."""


@dataclasses.dataclass
class Watch:
    """An observer: what was needed from one step to the end of another."""

    warmup: int
    steps: int
    marks: list[tuple[float, float, float, int]] = dataclasses.field(default_factory=list)
    """Time, CPU time of the process and of this thread, and calls of Ray, after each step."""
    metas: list[RolloutMeta] = dataclasses.field(default_factory=list)
    """Of all rollouts that were trained on in the steps that are measured."""
    staleness: float = 0.0

    async def on_step(self, report: StepReport) -> None:
        self.marks.append((time.monotonic(), time.process_time(), time.thread_time(), sum(Seat.calls.values())))
        if report.step > self.warmup:
            self.metas += [entry.meta for entry in report.entries]
        self.staleness = max(self.staleness, report.metrics["staleness/max"])
        if report.step == self.warmup + self.steps:
            raise Enough


def loop(
    generators: int, per_call: int, warmup: int, steps: int, rate: float, max_staleness: int = 2
) -> dict[str, Any]:
    """Runs the loop and measures ``steps`` of it; ``rate``: rollouts a second that the devices may bring at most."""
    config = configured(generators, per_call, warmup + steps + max_staleness + 1, max_staleness)
    second_s = max(1 / _FASTEST, generators * AT_ONCE / (_mean_length() * TOKEN_S) / rate)
    house, watch = House(config, second_s), Watch(warmup, steps)

    async def run() -> None:
        limit = config.deadlines.start_s
        await asyncio.gather(*(room.up(limit) for room in house.rooms.every))
        whole = pipeline(config, house.rooms)
        await whole.broadcast(0)
        with contextlib.suppress(Enough):
            await whole.run([watch])

    try:
        asyncio.run(run())
    finally:
        house.close()
    assert watch.staleness <= max_staleness
    wall, cpu, thread, calls = (
        after - before for before, after in zip(watch.marks[warmup - 1], watch.marks[-1], strict=True)
    )
    rooms = _alone(config, watch.metas, steps)
    slowest, device_s = max(rooms.items(), key=lambda each: each[1])
    rollouts = sum(meta.source == "student" for meta in watch.metas)
    return {
        "generators": generators,
        "rollouts_per_call": per_call,
        "max_staleness": max_staleness,
        "device_second_s": second_s,
        "rollouts_per_s": rollouts / wall,
        "driver_ms_per_rollout": cpu / rollouts * 1000,
        "loop_ms_per_rollout": thread / rollouts * 1000,
        "driver_cores": cpu / wall,
        "calls_per_rollout": calls / rollouts,
        "slowest_room": slowest,
        "share_of_ideal": device_s * second_s / wall,
    }


def _alone(config: Config, metas: Sequence[RolloutMeta], steps: int) -> dict[str, float]:
    """Seconds of devices that each room would take for these rollouts, never waiting for another."""
    students = [meta for meta in metas if meta.source == "student"]
    generated = sum(meta.num_response_tokens for meta in students)
    read = sum(meta.num_tokens for meta in students)
    trained = sum(meta.num_tokens for meta in metas)
    rooms = {"generate": generated * TOKEN_S / AT_ONCE / config.rollout.num_generators}
    rooms |= {role: read / SCORED_PER_S / scorer.num_actors for role, scorer in config.scorers.items()}
    return rooms | {"learn": trained / TRAINED_PER_S / config.learner.num_ranks + steps * BROADCAST_S}


def _mean_length() -> float:
    return float(np.mean([length(seed) for seed in range(1000)]))


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--generators", default="8,64,256", show_default=True, help="How many, one loop after the other.")
@click.option("--per-call", default="32", show_default=True, help="Rollouts a call.")
@click.option("--staleness", default="0,1,2,4", show_default=True, help="Values of buffer.max_staleness.")
@click.option("--rate", default=2000.0, show_default=True, help="Most rollouts a second that the devices may bring.")
@click.option("--steps", default=6, show_default=True, help="Steps that are measured of each loop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was measured to this file.")
def main(
    parts: tuple[str, ...],
    generators: str,
    per_call: str,
    staleness: str,
    rate: float,
    steps: int,
    json_file: Path | None,
) -> None:
    """Measures the runtime without models."""
    found: dict[str, list[dict[str, Any]]] = {}
    if "bookkeeping" in (parts or PARTS):
        found["bookkeeping"] = bookkeeping(steps)
    with cluster():
        if "generators" in (parts or PARTS):
            found["generators"] = [
                loop(number, calls, 4, steps, rate) for number in _numbers(generators) for calls in _numbers(per_call)
            ]
        if "staleness" in (parts or PARTS):
            found["staleness"] = [loop(8, 32, 3, steps, rate, bound) for bound in _numbers(staleness)]
    for part, rows in found.items():
        table = Table(*rows[0], title=part, title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2))


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


if __name__ == "__main__":
    main()
