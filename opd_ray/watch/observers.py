"""What watches a run from inside the driver: metrics, the rollout log, the progress lines, the summary."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

from opd_ray.config import HELD_OUT, Config
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation, Scores, SetScores, with_error
from opd_ray.messages import Entry
from opd_ray.rooms import Rooms
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import busy_share
from opd_ray.rooms.threads import in_thread
from opd_ray.watch.guard import GuardEvent
from opd_ray.watch.metrics import MetricsWriter


class Metrics:
    """Every step to metrics.jsonl, Ray's metrics port and the trackers, with what the rooms did since the last."""

    def __init__(self, writer: MetricsWriter, rooms: Rooms, more: Callable[[], dict[str, float]]) -> None:
        """``more``: what else there is to say after a step."""
        self._writer, self._rooms, self._more = writer, rooms, more
        self._since, self._work = time.monotonic(), self._worked()

    async def on_step(self, report: StepReport) -> None:
        values = report.metrics | self._rates(report) | self._more()
        values |= {"guard/events": float(len(report.events))}
        if report.evaluation:
            values |= report.evaluation.metrics()
        said = [(f"guard/{event.level}", str(event)) for event in report.events]
        await in_thread(self._writer.write, report.step, values, said)

    def _worked(self) -> dict[str, tuple[float, float]]:
        return {name: room.work() for name, room in self._rooms.all.items()}

    def _rates(self, report: StepReport) -> dict[str, float]:
        now, work = time.monotonic(), self._worked()
        wall = now - self._since
        rates = {"throughput/tokens_per_s": report.student_tokens / wall, "throughput/step_s": wall}
        for name in work:
            if (busy := busy_share(work[name], self._work[name])) is not None:
                rates[f"idle/{name}"] = 1 - busy
        self._since, self._work = now, work
        return rates


class RolloutLog:
    """The rollouts of every n-th step to rollouts/*.parquet, written by an actor beside the next steps. And of the
    first step and of those behind a checkpoint, for which the weights are there to replay them."""

    def __init__(
        self, recorder: Pool, directory: Path, config: Config, asked: Callable[[Entry], tuple[str, str]]
    ) -> None:
        """``asked``: the prompt's text and the expected answer of a rollout."""
        self._recorder, self._directory, self._asked = recorder, directory, asked
        self._every, self._keep = config.metrics.rollout_log_every_steps, config.metrics.rollout_log_keep
        self._saves = config.checkpoint.every_steps
        self._writing: asyncio.Task[Any] | None = None

    async def on_step(self, report: StepReport) -> None:
        """Raises what went wrong with the step before, as soon as it is known."""
        if self._writing is not None and self._writing.done():
            await self.written()
        saved = report.step - 1  # the weights of this version trained on the rollouts
        replays = saved == 0 or (self._saves > 0 and saved % self._saves == 0)
        if self._every and (replays or report.step % self._every == 0):
            entries = list(report.entries)
            asked = [self._asked(entry) for entry in entries]
            await self.written()
            write = self._recorder.call(
                "write", str(self._directory), report.step, entries, asked, self._keep, payload=False
            )
            self._writing = asyncio.create_task(write, name="write the rollout log")

    async def written(self) -> None:
        """Waits for what is being written; raises what went wrong."""
        await self.settle()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    async def settle(self, limit_s: float | None = None) -> None:
        """Waits for what is being written, whether it succeeds or not, but not for longer than ``limit_s``."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=limit_s)


class VerdictLog:
    """The verdicts of evaluations on the way to evaluations/step-N."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    async def on_step(self, report: StepReport) -> None:
        if report.evaluation:
            into = verdicts.directory(self._run_dir, report.step)
            await in_thread(verdicts.write, into, report.evaluation.verdicts)


class Progress:
    """One line on the console every few seconds; the guard's events at once."""

    def __init__(self, steps: int, first_step: int, say: Callable[..., None], every_s: float = 2.0) -> None:
        """``say(kind, text, step=...)`` tells people what happened."""
        self._say, self._steps, self._first, self._every_s = say, steps, first_step, every_s
        self._began = self._printed = time.monotonic()
        self._tokens = 0

    async def on_step(self, report: StepReport) -> None:
        self._tokens += report.student_tokens
        now = time.monotonic()
        due = now - self._printed >= self._every_s or report.step in (self._first + 1, self._steps)
        for event in report.events:
            self._say("guard", str(event), **asdict(event))
        if not (due or report.evaluation):
            return
        print(self._line(report, now), flush=True)
        self._printed, self._tokens = now, 0
        if report.evaluation:
            say_evaluation(self._say, f"step {report.step}", report.evaluation)

    def _line(self, report: StepReport, now: float) -> str:
        metrics, parts = report.metrics, [f"step {report.step:>4}/{self._steps}"]
        if "rollouts/accuracy" in metrics:
            parts += [
                f"accuracy {metrics['rollouts/accuracy']:.2f}",
                f"length {metrics['rollouts/length']:5.1f}",
                f"truncated {metrics['rollouts/truncation_rate']:.2f}",
                f"staleness {metrics['staleness/mean']:.1f}",
            ]
        left = (self._steps - report.step) * (now - self._began) / (report.step - self._first)
        minutes, seconds = divmod(round(left), 60)
        rate = self._tokens / max(now - self._printed, 1e-9)
        return " | ".join(
            [*parts, f"loss {metrics['learner/loss']:.3f}", f"{rate:6,.0f} tok/s", f"{minutes}:{seconds:02d} left"]
        )


class EvaluationProgress:
    """A line on the console every few seconds while held-out problems are answered."""

    def __init__(self, every_s: float = 10.0, to: TextIO | None = None) -> None:
        """``to``: by default stdout."""
        self._began = self._printed = time.monotonic()
        self._every_s, self._to = every_s, to

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed >= self._every_s:
            self._printed = now
            minutes, seconds = divmod(round((total - done) * (now - self._began) / done), 60)
            print(f"evaluating: {done:,} of {total:,} answers, {minutes}:{seconds:02d} left", file=self._to, flush=True)


def say_evaluation(say: Callable[..., None], when: str, evaluation: Evaluation | None) -> None:
    """A line, and one more for each set that has a name; ``say`` as of Progress."""
    if evaluation is None:
        return
    _say_scores(say, f"evaluation {when}", evaluation)
    for name, scores in evaluation.sets.items():
        if name != HELD_OUT:
            _say_scores(say, f"    {name}", scores, set=name)


def _say_scores(say: Callable[..., None], what: str, scores: Scores, **fields: str) -> None:
    known = ("accuracy_greedy", "accuracy_sampled", "accuracy_sampled_se", "truncation_rate", "mean_length")
    say("evaluation", f"{what}: {_said(scores)}", **{name: getattr(scores, name) for name in known}, **fields)


def _said(scores: Scores) -> str:
    parts = [
        *([f"greedy {scores.accuracy_greedy:.3f}"] if scores.accuracy_greedy is not None else []),
        f"sampled {with_error(scores.accuracy_sampled, scores.accuracy_sampled_se)}",
        *(_passed(scores) if isinstance(scores, SetScores) else []),
        f"truncated {scores.truncation_rate:.3f}",
        f"repetitive {scores.repetition_rate:.3f}",
        f"length {scores.mean_length:.1f} ({scores.num_problems} problems)",
    ]
    return ", ".join(parts)


def _passed(scores: SetScores) -> list[str]:
    return [f"pass@{scores.samples} {scores.pass_at[str(scores.samples)]:.3f}"] if scores.samples > 1 else []


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

    @property
    def student_tokens(self) -> int:
        """Response tokens of the student that the step trained on."""
        return sum(entry.meta.num_trained_tokens for entry in self.entries if entry.meta.source == "student")


class Observer(Protocol):
    """Watches a run: metrics, rollout log, progress display, checkpoints, benchmarks."""

    async def on_step(self, report: StepReport) -> None:
        """Called after every step, in order; the learner waits for it."""
