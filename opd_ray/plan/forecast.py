"""What is expected of a run, beside what came: ``plan`` in summary.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opd_ray.config import Config
from opd_ray.messages import MemoryUse
from opd_ray.plan.flow import Step, step_of
from opd_ray.plan.outlook import measured_memory, outlook, predicted_memory, processes_at
from opd_ray.watch.observers import StepReport

if TYPE_CHECKING:
    from opd_ray.run.preflight import Preflight

_FEWEST_STEPS = 10
"""Measured steps from which the rate of the others is told."""


class Forecast:
    """An observer: from the first steps it tells the rate of the others, and when the run will end.

    Steps with an evaluation are left out; so are the first ones, in which the rooms fill up and compile.
    """

    def __init__(self, config: Config, facts: Preflight, say: Callable[..., None]) -> None:
        self.outlook = outlook(config, facts)
        self._config, self._facts, self._say, self._steps = config, facts, say, config.learner.steps
        self._largest = Step({}, 0.0, 0.0)
        """Of the steps that came."""
        self._of_student = config.uses_student
        self._window = max(_FEWEST_STEPS, config.learner.steps // 10)
        self._left_out = self._window // 2 + config.buffer.max_staleness
        self._since = time.monotonic()
        self._tokens, self._seconds = 0, 0.0
        self._predicted: float | None = None

    def go_on(self) -> None:
        """The next step begins now: what came before it (a restore, an evaluation) is no part of it."""
        self._since = time.monotonic()

    async def on_step(self, report: StepReport) -> None:
        now = time.monotonic()
        wall, self._since = now - self._since, now
        step = step_of([entry.meta for entry in report.entries if entry.is_trained_on])
        self._largest = max(self._largest, step, key=lambda each: each.tokens)
        if report.evaluation is not None:
            return
        if self._left_out:
            self._left_out -= 1
            return
        trained = report.student_tokens if self._of_student else step.trained_tokens
        self._tokens, self._seconds, self._window = self._tokens + trained, self._seconds + wall, self._window - 1
        if self._window == 0:
            self._predicted = self._tokens / self._seconds
            left = (self._steps - report.step) * self._seconds / max(_FEWEST_STEPS, self._steps // 10)
            self._say("forecast", f"forecast: {self._predicted:,.0f} tokens/s, {_span(left)} of steps left")

    def result(self, memory: Mapping[str, MemoryUse]) -> dict[str, Any]:
        """Tokens a second that the steps trained on, and bytes of one process of each room: as the first steps (None
        where there were too few) and the arithmetic had it, for the largest step that came and for the largest that
        might have come; and as all steps and the processes had it."""
        came = processes_at(self._config, self._facts, self._largest) if self._largest.rollouts else ()
        return {
            "predicted": {
                "tokens_per_s": self._predicted,
                "memory": predicted_memory(came),
                "memory_at_most": predicted_memory(self.outlook.processes),
            },
            "measured": {
                "tokens_per_s": self._tokens / self._seconds if self._seconds else None,
                "memory": measured_memory(memory),
            },
        }


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{seconds:02d} min"
