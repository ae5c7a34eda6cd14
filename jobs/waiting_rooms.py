"""Rooms whose engines only take their time, for jobs that measure what is around them (bench_runtime.py).

Metas and payloads are as large as real ones, and what comes of them is counted in tokens. Times are those of devices,
which a run lets pass faster. Many workers of a room sit in one process; each has a handle of its own all the same, so
that whoever calls them makes the calls that it would make anywhere.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from opd_ray.config import Config
from opd_ray.messages import (
    ROLLOUT_SCHEMA,
    SCORE_SCHEMA,
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
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member

MEDIAN_TOKENS, SPREAD, MOST_TOKENS, PROMPT_TOKENS = 1500, 0.8, 8192, 200
TOKEN_S, AT_ONCE = 0.02, 8
"""Of a generator: seconds of a token, and responses that it runs at once."""
NUM_RANKS, SCORED_PER_S, TRAINED_PER_S, BROADCAST_S = 2, 30_000, 1_000, 2.0
"""Tokens a second of one scorer, and of the ranks together for each generator; seconds of a broadcast."""
_HOSTS = 3
"""Processes that the generators sit in."""


def length(seed: int) -> int:
    """Tokens of the response that is sampled with a seed."""
    return min(MOST_TOKENS, int(np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD)) + 1)


# ---- processes ----


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
        return metas, rollouts(metas)

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
    """They share the work of as many as there would be, and fetch what one of those would of one micro-batch."""

    def __init__(self, second_s: float, tokens_per_s: float) -> None:
        super().__init__(second_s)
        self._tokens_per_s = tokens_per_s

    async def node_address(self, seat: int) -> tuple[str, int]:
        return "here", 1

    async def open_transport(self, seat: int, group: TransferGroup) -> None:
        pass

    async def send_weights(self, seat: int, manifest: WeightManifest) -> None:
        await asyncio.sleep(BROADCAST_S * self._second_s)

    async def train_step(self, seat: int, plan: StepPlan) -> StepOutcome:
        began, entries = time.monotonic(), [entry for batch in plan.micro_batches for entry in batch]
        await asyncio.gather(
            *(ref for entry in plan.micro_batches[0] for ref in (entry.rollouts, *entry.scores.values()))
        )
        takes = sum(entry.meta.num_tokens for entry in entries) / self._tokens_per_s * self._second_s
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


def rollouts(metas: Sequence[RolloutMeta]) -> pa.RecordBatch:
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
            learner=Group(
                "learn",
                self._spawning("learner", Ranks, 1, TRAINED_PER_S * config.rollout.num_generators / NUM_RANKS),
                config.learner.num_ranks,
                limit,
            ),
            scorers={
                role: Pool(role, self._spawning(f"{role}-scorer", Scorers, 1), scorer.size, limit)
                for role, scorer in config.scorers.items()
            },
            teacher_generators=None,
            recorder=Pool("record", self._spawning("recorder", Host, 1), PoolSize.fixed(1), limit),
        )

    def _spawning(self, role: str, kind: type[Host], processes: int, *more: float) -> Callable[[int, int], Member]:
        made = ray.remote(kind).options(num_cpus=0, max_concurrency=100_000)
        hosts = [made.remote(self._second_s, *more) for _ in range(processes)]
        self._hosts += hosts
        return lambda number, restart: Member(Seat(hosts[number % processes], number), f"{role}-{number}")

    def close(self) -> None:
        for host in self._hosts:
            ray.kill(host)
