"""An object store and snapshots for tests of checkpoints."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.messages import Entry
from opd_ray.snapshots import Checkpoint, Shelf, Snapshot
from small_messages import meta


@dataclasses.dataclass(frozen=True)
class Ref:
    number: int


class Objects:
    """Objects by their refs; calls functions at once, as :class:`opd_ray.snapshots.calls.FileCalls` does."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._objects: dict[Ref, Any] = {}
        self.calls: list[tuple[str, Any]] = []
        """(function, its second argument: a name to write, or what to read)."""

    def put(self, value: Any) -> Ref:
        ref = Ref(next(self._numbers))
        self._objects[ref] = value
        return ref

    def get(self, ref: Ref) -> Any:
        return self._objects[ref]

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self.calls.append((function.__name__, args[1]))
        return function(*(self._objects[arg] if isinstance(arg, Ref) else arg for arg in args))

    async def payload(self, function: Callable[..., Any], *args: Any) -> Ref:
        return self.put(await self(function, *args))


def make_snapshot(objects: Objects, step: int, *, healthy: bool = True, seed: int = 0) -> Snapshot:
    """Two learner ranks, one follower, three slots: two rollouts of one payload, none, and one of another payload."""
    rng = np.random.default_rng([step, seed])

    def arrays() -> Ref:
        weights = {"weight": rng.standard_normal((2, 3), np.float32), "bias": rng.standard_normal(5)}
        return objects.put(weights | {"step": np.array(step), "mask": rng.random(3) < 0.5, "none": np.zeros((0, 4))})

    def batch(rows: int) -> Ref:
        return objects.put(pa.record_batch({"tokens": [rng.integers(0, 9, 4).tolist() for _ in range(rows)]}))

    def entry(slot: int, row: int, rollouts: Ref, scores: dict[str, Ref]) -> Entry:
        values = {"mean_behaviour_logprob": -rng.random(), "mean_version": rng.random()}
        if row:
            values = {"mean_behaviour_logprob": math.nan, "source": "teacher", "oldest_version": -1}
        return Entry(meta(slot, rollout_id=f"{slot}-{row}", **values), row, rollouts, scores, rng.random())

    first, second = 3 * step, 3 * step + 2
    pair, alone = batch(2), batch(1)
    scores = {"teacher": batch(2), "reference": batch(2)}
    return Snapshot(
        step=step,
        learner_facts={"num_ranks": 2, "lr": rng.random()},
        learner_parts=(arrays(), arrays()),
        followers={"reference": ({"version": step}, arrays())},
        slots=(first, first + 1, second),
        entries=(entry(first, 0, pair, scores), entry(first, 1, pair, scores), entry(second, 0, alone, {})),
        state={"healthy": healthy, "guard": {"num_rollbacks": seed}, "events": [{"value": math.inf}]},
    )


def contents(objects: Objects, snapshot: Snapshot) -> Any:
    """All that a snapshot holds, in plain values that compare equal."""

    def plain(value: Any) -> Any:
        if isinstance(value, Ref):
            return plain(objects.get(value))
        if isinstance(value, np.ndarray):
            return (value.dtype.name, value.shape, value.tobytes())
        if isinstance(value, pa.RecordBatch):
            return (str(value.schema), value.to_pylist())
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return {field.name: plain(getattr(value, field.name)) for field in fields}
        return repr(value)  # nan is nan

    return plain(snapshot)


def held(shelf: Shelf, objects: Objects, checkpoint: Checkpoint) -> Any:
    """All that a checkpoint holds, as :func:`contents` has it."""
    return contents(objects, asyncio.run(shelf.read(checkpoint)))
