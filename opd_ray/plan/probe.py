"""A short real run, in the rooms that the configuration asks for: what its steps take is what the run's will take.

Nothing of it is kept: results go to a temporary directory, and no checkpoint is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.messages import MemoryUse, Source
from opd_ray.placement.session import Session
from opd_ray.plan.flow import Step, step_of
from opd_ray.plan.rates import RoomRate, Tokens, measured
from opd_ray.watch.observers import StepReport

LONGEST_S = 120.0
"""From the first step on; a probe ends with the first step after it."""
_LONG_ENOUGH_S = 20.0
_ENOUGH_STEPS = 30
"""Of steps shorter than a second the mean of so many is taken."""
_FEWEST_STEPS = 2


class _Enough(Exception):
    """The probe has seen what it needs."""


class _Clock:
    """Observer that ends the run when enough steps were seen."""

    def __init__(self, left_out: int) -> None:
        self._left_out = left_out
        self._began = time.monotonic()
        self.start_s = 0.0
        """Until the first step was done."""
        self.num_steps = 0
        self.largest = Step({}, 0.0, 0.0)

    async def on_step(self, report: StepReport) -> None:
        trained = [each.meta for each in report.entries if each.is_trained_on]
        self.largest = max(self.largest, step_of(trained), key=lambda step: step.tokens)
        self.num_steps += 1
        now = time.monotonic()
        if self.num_steps == 1:
            self.start_s, self._began = now - self._began, now
        seconds, steps = now - self._began, self.num_steps - self._left_out
        enough = steps >= _ENOUGH_STEPS and seconds >= _LONG_ENOUGH_S
        if enough or (self.num_steps > _FEWEST_STEPS and seconds >= LONGEST_S):
            raise _Enough


@dataclass(frozen=True)
class Probe:
    """The mean of the steps that were measured."""

    num_steps: int
    step_s: float
    step: Step
    """With the lengths that responses had."""
    largest: Step
    """Of all that came."""
    rooms: tuple[RoomRate, ...]
    memory: Mapping[str, MemoryUse]
    """Of one process of each room, at the most."""
    start_s: float
    """From nothing until the first step was done."""


def probe(config: Config) -> Probe:
    """Needs a connection to Ray. Raises RunError where the run ends before two steps could be measured."""
    from opd_ray.run.train import train

    evaluation = dataclasses.replace(config.evaluation, num_problems=0, every_steps=0)
    checkpoint = dataclasses.replace(config.checkpoint, directory=None, every_steps=0)
    # Trackers keep their runs elsewhere, or upload what is left of them when the process ends.
    metrics = dataclasses.replace(config.metrics, trackers=())
    config = dataclasses.replace(config, evaluation=evaluation, checkpoint=checkpoint, metrics=metrics)
    # Until the slots of all steps that may be under way were filled once, rooms wait for others in another way.
    left_out = config.buffer.max_staleness + 3
    tokens, clock, session = Tokens(), _Clock(left_out), Session()
    with tempfile.TemporaryDirectory(prefix="opd-ray-plan-") as directory:
        run_dir = Path(directory) / "probe"
        try:
            with contextlib.suppress(_Enough):
                train(config, run_dir, observers=(tokens, clock), session=session)
            if clock.num_steps < _FEWEST_STEPS:
                raise RunError(f"the probe's run ended after {clock.num_steps} steps; give it learner.steps=40 or more")
            memory = asyncio.run(session.up.memory())
        finally:
            session.close()
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "throughput/step_s" in row]
    first = min(left_out, len(rows) // 2)
    return _mean(config, rows[first:], tokens.steps[first:], memory, clock)


def _mean(
    config: Config, rows: list[dict[str, Any]], tokens: list[Any], memory: Mapping[str, MemoryUse], clock: _Clock
) -> Probe:
    number = len(rows)
    rooms = tuple(measured(rows, tokens, config))
    trained = sum(counts["learn"] for counts in tokens)
    rollouts: dict[Source, float] = {
        source: sum(row.get(f"mixture/{source}_rollouts", 0.0) for row in rows) / number for source in config.sources
    }
    length = trained / number / max(1.0, sum(rollouts.values()))
    return Probe(
        num_steps=number,
        step_s=sum(row["throughput/step_s"] for row in rows) / number,
        step=Step(rollouts, 0.0, length),
        rooms=rooms,
        memory=memory,
        largest=clock.largest,
        start_s=clock.start_s,
    )
