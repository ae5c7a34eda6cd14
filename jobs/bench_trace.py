"""What --trace costs: `python jobs/bench_trace.py`.

An actor pays for each span, also where nobody collects them; the driver for each collection, here of six actors that
did forty things each in the two seconds since the last.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from opd_ray.messages import Span, Spans
from opd_ray.rooms import spans
from opd_ray.watch.trace import Trace


class Six:
    """A room of six actors on one node."""

    room = "generate"
    members = tuple(SimpleNamespace(node="node", name=f"student-generator-{number}") for number in range(6))

    def those(self, *_: str) -> tuple[Any, ...]:
        return self.members

    async def peek(self, *_: Any) -> Spans:
        now = time.monotonic()
        return Spans(now, tuple(Span("score", now - 2 + 0.05 * at, 0.04, {"rollouts": at}) for at in range(40)))


def cpu_s(times: int, work: Callable[[], Any]) -> float:
    """Of one call; the best of five tries."""
    tries = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(times):
            work()
        tries.append((time.process_time() - began) / times)
    return min(tries)


def span() -> None:
    with spans.span("train", step=3):
        pass


async def collections() -> float:
    with tempfile.TemporaryDirectory() as directory, mock.patch("opd_ray.watch.trace.this_node"):
        trace, tries = Trace(Path(directory), SimpleNamespace(every=[Six()]), print, time.monotonic() - 10), []
        for _ in range(20):
            began = time.process_time()
            await trace.collect()
            tries.append(time.process_time() - began)
    return min(tries)


if __name__ == "__main__":
    off = cpu_s(20_000, span)
    spans.collect()
    with mock.patch.object(spans, "_LEAST_S", 0.0):
        on = cpu_s(20_000, span)
    once = asyncio.run(collections())
    print(f"a span: {off * 1e6:.2f} µs, collected {on * 1e6:.2f} µs")
    print(f"a collection of 240 spans: {once * 1e3:.2f} ms, every 2 s: {once / 2:.2%} of a core")
