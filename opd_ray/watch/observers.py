"""What watches a run from inside the driver: metrics, the rollout log, the progress lines, the summary."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from opd_ray.config import MetricsConfig
from opd_ray.disk import writing
from opd_ray.evaluate import Evaluation
from opd_ray.messages import Entry
from opd_ray.rooms import Rooms
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.threads import in_thread
from opd_ray.watch.guard import GuardEvent
from opd_ray.watch.metrics import MetricsWriter


class Rates:
    """Adds throughput and idle shares, over the steps since the last report, to a step's metrics."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._since = time.monotonic()
        self._work = {name: room.work() for name, room in rooms.all.items()}

    def of(self, report: StepReport) -> dict[str, float]:
        now, work = time.monotonic(), {name: room.work() for name, room in self._rooms.all.items()}
        wall = now - self._since
        tokens = sum(entry.meta.num_response_tokens for entry in report.entries if entry.meta.source == "student")
        rates = {}
        for name, (busy, there) in work.items():
            busy_before, there_before = self._work[name]
            if there > there_before:
                rates[f"idle/{name}"] = max(0.0, 1 - (busy - busy_before) / (there - there_before))
        self._since, self._work = now, work
        return {"throughput/tokens_per_s": tokens / wall, "throughput/step_s": wall, **rates}


class Metrics:
    """Every step to TensorBoard, Ray's metrics port and metrics.jsonl."""

    def __init__(self, writer: MetricsWriter, rooms: Rooms, more: Callable[[], dict[str, float]]) -> None:
        """``more``: what else there is to say after a step."""
        self._writer, self._rates, self._more = writer, Rates(rooms), more

    async def on_step(self, report: StepReport) -> None:
        values = report.metrics | self._rates.of(report) | self._more()
        values |= {"guard/events": float(len(report.events))}
        if report.evaluation:
            values |= report.evaluation.metrics()
        said = [(f"guard/{event.level}", str(event)) for event in report.events]
        await in_thread(self._writer.write, report.step, values, said)


class RolloutLog:
    """The rollouts of every n-th step to rollouts/*.parquet, written by an actor while the run goes on."""

    def __init__(self, recorder: Pool, directory: Path, config: MetricsConfig) -> None:
        self._recorder, self._directory = recorder, directory
        self._every, self._keep = config.rollout_log_every_steps, config.rollout_log_keep

    async def on_step(self, report: StepReport) -> None:
        if self._every and (report.step == 1 or report.step % self._every == 0):
            await self._recorder.call(
                "write", str(self._directory), report.step, list(report.entries), self._keep, payload=False
            )


class Progress:
    """One line on the console every few seconds, and the same as JSON in progress.jsonl; the guard's events at once."""

    def __init__(
        self, run_dir: Path, steps: int, first_step: int, say: Callable[..., None], every_s: float = 2.0
    ) -> None:
        """``say(kind, text, step=...)`` tells people what happened."""
        self._say = say
        self._path = run_dir / "progress.jsonl"
        self._steps, self._first, self._every_s = steps, first_step, every_s
        self._began = self._printed = time.monotonic()
        self._tokens = 0

    async def on_step(self, report: StepReport) -> None:
        student = [entry.meta for entry in report.entries if entry.meta.source == "student"]
        self._tokens += sum(meta.num_response_tokens for meta in student)
        now = time.monotonic()
        due = now - self._printed >= self._every_s or report.step in (self._first + 1, self._steps)
        for event in report.events:
            self._say("guard", str(event), **asdict(event))
        if not (due or report.evaluation):
            return
        done = report.step - self._first
        line = {
            "phase": "train",
            "step": report.step,
            "steps": self._steps,
            "accuracy": report.metrics.get("rollouts/accuracy"),
            "length": report.metrics.get("rollouts/length"),
            "truncation": report.metrics.get("rollouts/truncation_rate"),
            "loss": report.metrics["learner/loss"],
            "staleness": report.metrics.get("staleness/mean"),
            "tokens_per_s": self._tokens / max(now - self._printed, 1e-9),
            "seconds_left": (self._steps - report.step) * (now - self._began) / done,
        }
        self._printed, self._tokens = now, 0
        await in_thread(self._append, json.dumps(line) + "\n")
        print(_line(line), flush=True)
        if report.evaluation:
            say_evaluation(f"step {report.step}", report.evaluation)

    def _append(self, line: str) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as lines:
            lines.write(line)


def say_evaluation(when: str, evaluation: Evaluation | None) -> None:
    if evaluation is None:
        return
    print(
        f"evaluation {when}: greedy {evaluation.accuracy_greedy:.3f}, sampled {evaluation.accuracy_sampled:.3f}, "
        f"truncated {evaluation.truncation_rate:.3f}, repetitive {evaluation.repetition_rate:.3f}, "
        f"length {evaluation.mean_length:.1f} ({evaluation.num_problems} problems)",
        flush=True,
    )


def _line(line: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(line["seconds_left"]), 60)
    parts = [f"step {line['step']:>4}/{line['steps']}"]
    if line["accuracy"] is not None:
        parts += [
            f"accuracy {line['accuracy']:.2f}",
            f"length {line['length']:5.1f}",
            f"truncated {line['truncation']:.2f}",
            f"staleness {line['staleness']:.1f}",
        ]
    parts += [f"loss {line['loss']:.3f}", f"{line['tokens_per_s']:6,.0f} tok/s", f"{minutes}:{seconds:02d} left"]
    return " | ".join(parts)


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, for whoever watches."""

    step: int
    """Finished optimizer steps, which is also the version of the weights they made."""
    entries: Sequence[Entry]
    metrics: dict[str, float]
    evaluation: Evaluation | None
    events: Sequence[GuardEvent] = ()
    """What the guard said after this step."""


class Observer(Protocol):
    """Watches a run: metrics, rollout log, progress display, checkpoints, benchmarks."""

    async def on_step(self, report: StepReport) -> None:
        """Called after every step, in order; the learner waits for it."""
