"""The summary of a long run: as true as that of a short one, and as small."""

import asyncio
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from opd_ray.config import from_dict
from opd_ray.run.summary import Summary
from opd_ray.watch.guard import GuardEvent
from opd_ray.watch.observers import Metrics, Progress, StepReport

MANY = 100_000


def warning(step, level="warn"):
    return GuardEvent(step, "entropy", 0.5, 0.25, level, "what was done")


def report(step, events=()):
    metrics = {
        "learner/loss": 1.0,
        "learner/train_s": 2.0,
        "learner/weight_sync_s": step / MANY,
        "staleness/mean": float(step % 3),
        "staleness/max": float(step % 7),
    }
    return StepReport(step, [], metrics, None, events)


@pytest.mark.slow
def test_a_run_of_many_steps_takes_no_more_memory_than_one_of_few(tmp_path, capsys):
    """The bug: every step's metrics stayed in memory, and every event of the guard was copied into each checkpoint."""
    writer = SimpleNamespace(write=lambda *_: None)
    summary = Summary()

    async def steps(first, last):
        for step in range(first, last + 1):
            await summary.on_step(report(step, [warning(step, "rollback" if step == 50_000 else "warn")]))
            if step % 500 == 0:  # each starts threads, which takes its time
                for observer in others:
                    await observer.on_step(report(step))

    others = [Metrics(writer, SimpleNamespace(all={}), dict), Progress(MANY, 0, print)]
    held = []
    asyncio.run(steps(1, MANY - 20_000))
    tracemalloc.start()  # a step now takes four times as long
    for first in (MANY - 19_999, MANY - 9_999):
        asyncio.run(steps(first, first + 9_999))
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 1e5, "bytes, over 10 000 steps"
    result = summary.result(from_dict({}), None)
    assert result["weight_sync_s"]["p50"] == pytest.approx(0.5, abs=0.03)
    assert result["weight_sync_s"]["max"] == 1.0
    assert result["staleness"] == {"mean": pytest.approx(1.0, abs=1e-4), "max": 6.0}
    assert len(json.dumps(summary.state())) < 40_000
    assert summary.state()["guard_event_counts"] == {"warn entropy": MANY - 1, "rollback entropy": 1}
    kept = [event["step"] for event in summary.state()["guard_events"]]
    assert kept == [*range(1, 101), 50_000, *range(MANY - 99, MANY + 1)]


def test_the_median_of_few_values_is_exact():
    summary = Summary()
    values = [0.5, 0.125, 4.0, 0.25]

    async def steps():
        for value in values:
            await summary.on_step(StepReport(1, [], {"learner/weight_sync_s": value}, None))

    asyncio.run(steps())
    assert summary.result(from_dict({}), None)["weight_sync_s"] == {"p50": np.median(values), "max": 4.0}


def test_a_resumed_run_goes_on_counting_events():
    first = Summary()
    asyncio.run(first.on_step(report(1, [warning(1)])))
    again = Summary(json.loads(json.dumps(first.state())))
    asyncio.run(again.on_step(report(2, [warning(2)])))
    assert again.state()["guard_event_counts"] == {"warn entropy": 2}
    older = {name: value for name, value in first.state().items() if name != "guard_event_counts"}
    assert Summary(older).state()["guard_event_counts"] == {"warn entropy": 1}, "of a checkpoint of before"
