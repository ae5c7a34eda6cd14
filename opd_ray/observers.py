"""What watches a run from inside the driver: metrics, the rollout log, the progress lines, the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.evaluate import Evaluation
from opd_ray.metrics import MetricsWriter
from opd_ray.pipeline import StepReport
from opd_ray.pool import Pool
from opd_ray.rooms import Rooms


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
        self._writer.write(report.step, values)
        for event in report.events:
            self._writer.say(report.step, f"guard/{event.level}", str(event))


class RolloutLog:
    """The rollouts of every n-th step to rollouts/*.parquet, written by an actor while the run goes on."""

    def __init__(self, recorder: Pool, directory: Path, every_steps: int) -> None:
        self._recorder, self._directory, self._every = recorder, directory, every_steps

    async def on_step(self, report: StepReport) -> None:
        if self._every and (report.step == 1 or report.step % self._every == 0):
            await self._recorder.call_one("write", str(self._directory), report.step, list(report.entries))


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
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        print(_line(line), flush=True)
        if report.evaluation:
            say_evaluation(f"step {report.step}", report.evaluation)


class Summary:
    """Adds up what summary.json reports; its clock starts when it is made, just before the first step.

    ``state`` goes into checkpoints and makes a resumed run's summary that of the whole run; what is not in it
    (throughput, staleness, weight sync) is that of the last start.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._began = time.monotonic()
        self._steps: list[dict[str, float]] = []
        self._rollout_tokens = 0
        before = state or {}
        self._events: list[dict[str, Any]] = list(before.get("guard_events", []))
        self._max_truncation_rate = float(before.get("max_truncation_rate", 0.0))
        self._trained_tokens = int(before.get("trained_tokens", 0))
        self._earlier_s = float(before.get("wall_s", 0.0))
        self._eval_before = before.get("eval_before")
        self.restarts: dict[str, int] = dict(before.get("restarts", {}))
        """Workers that were replaced in earlier starts of the run, by room."""

    @property
    def evaluated_before(self) -> Evaluation | None:
        """The student's evaluation before the first step, where an earlier start of this run has made it."""
        return Evaluation(**self._eval_before) if self._eval_before else None

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """The steps after a snapshot's ``state`` (None: all) are undone: their tokens no longer count as trained."""
        self._trained_tokens = int((state or {}).get("trained_tokens", 0))

    def begin(self, before: Evaluation | None) -> None:
        """Notes the evaluation before the first step."""
        self._eval_before = asdict(before) if before else None

    async def on_step(self, report: StepReport) -> None:
        self._steps.append(report.metrics)
        self._events += [asdict(event) for event in report.events]
        truncated = report.metrics.get("rollouts/truncation_rate", 0.0)
        self._max_truncation_rate = max(self._max_truncation_rate, truncated)
        for entry in report.entries:
            self._trained_tokens += entry.meta.num_response_tokens
            self._rollout_tokens += entry.meta.num_response_tokens if entry.meta.source == "student" else 0

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "guard_events": self._events,
            "max_truncation_rate": self._max_truncation_rate,
            "trained_tokens": self._trained_tokens,
            "wall_s": self._earlier_s + time.monotonic() - self._began,
            "eval_before": self._eval_before,
        }

    def result(self, config: Config, after: Evaluation | None) -> dict[str, Any]:
        wall = time.monotonic() - self._began
        sync = self._values("learner/weight_sync_s") or [0.0]
        staleness = self._values("staleness/mean")
        return {
            "method": config.method,
            "name": config.label,
            "seed": config.seed,
            "steps": config.learner.steps,
            "rollout_tokens": self._rollout_tokens,
            "tokens_per_s": self._rollout_tokens / wall,
            "learner_idle_share": 1 - sum(self._values("learner/train_s") + sync) / wall,
            "weight_sync_s": {"p50": float(np.median(sync)), "max": max(sync)},
            "staleness": {
                "mean": float(np.mean(staleness)) if staleness else 0.0,
                "max": max(self._values("staleness/max"), default=0.0),
            },
            "eval_after": asdict(after) if after else None,
        } | self.state()

    def _values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self._steps if name in metrics]


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
