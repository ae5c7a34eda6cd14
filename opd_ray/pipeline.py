"""The loop, and the map of it.

    prompts ──slot──▶ GENERATE ──rollouts──▶ SCORE ──scored──▶ BUFFER ──step──▶ LEARN
       ▲                 ▲                (teacher, reference)     ▲                │
       │                 │                                  golden ┘                │
       │                 └───────────────── weights v+1, broadcast ◀────────────────┤
       └──────────── a slot is freed when its step was trained and broadcast ◀──────┘

Two loops run in the driver at the same time and share nothing but slots and buffer:

``_admit``    takes free slots, asks a generator for their rollouts, has them scored by teacher and
              reference at once, and puts them into the buffer. Waits for: free slots.
``_learn``    takes a step from the buffer, trains it on all learner ranks, broadcasts the new weights, frees
              the step's slots, evaluates and saves when it is time. Waits for: a complete step.

The driver makes every call and therefore owns every object; payloads never pass through it.
Step ``s`` (0-based) trains weights of version ``s`` into version ``s + 1``. A failure in any room ends both
loops with its cause.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Protocol

from opd_ray.batching import plan_step
from opd_ray.buffer import ReplayBuffer
from opd_ray.config import Config
from opd_ray.evaluate import Evaluation, evaluate
from opd_ray.messages import Entry, PromptGroup, RolloutMeta, SamplingSettings, WeightManifest
from opd_ray.metrics import rollout_metrics
from opd_ray.pool import Pool
from opd_ray.prompts import PromptStream
from opd_ray.slots import Slots


@dataclasses.dataclass(frozen=True)
class Rooms:
    """The actors of a run, one pool per room."""

    generators: Pool
    learner: Pool
    teacher: Pool | None
    """None where nothing is on-policy (SFT)."""
    reference: Pool | None
    """None where the KL to the reference has no weight."""

    @property
    def scorers(self) -> dict[str, Pool]:
        return {role: pool for role, pool in (("teacher", self.teacher), ("reference", self.reference)) if pool}

    @property
    def all(self) -> dict[str, Pool]:
        return {"generate": self.generators, "learn": self.learner, **self.scorers}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, for whoever watches."""

    step: int
    """Finished optimizer steps, which is also the version of the weights they made."""
    entries: Sequence[Entry]
    metrics: dict[str, float]
    evaluation: Evaluation | None


class Observer(Protocol):
    """Watches a run: metrics, rollout log, progress display, checkpoints, benchmarks."""

    async def on_step(self, report: StepReport) -> None:
        """Called after every step, in order; the learner waits for it."""


class Pipeline:
    """Runs the rooms from ``first_step`` to the configured number of steps."""

    def __init__(
        self,
        *,
        config: Config,
        rooms: Rooms,
        buffer: ReplayBuffer,
        prompts: PromptStream,
        problems: PromptStream,
        stop_token_ids: tuple[int, ...],
        manifest: WeightManifest,
        first_step: int = 0,
    ) -> None:
        self._config, self._rooms, self._buffer = config, rooms, buffer
        self._prompts, self._problems = prompts, problems
        self._stop_token_ids, self._manifest = stop_token_ids, manifest
        self._first_step = first_step
        per_step = config.buffer.prompts_per_step
        self._slots = Slots(config.buffer.num_slots, first=first_step * per_step)
        self._sampling = SamplingSettings(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_response_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids,
        )

    async def run(self, observers: Sequence[Observer]) -> None:
        """Returns when the last step was broadcast and observed; raises the first failure of any room."""
        try:
            async with asyncio.TaskGroup() as group:
                admit = group.create_task(self._admit(group), name="admit")
                await self._learn(observers)
                admit.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    async def evaluate(self, num_problems: int) -> Evaluation:
        """Held-out accuracy of the weights that the generators hold."""
        most = min(num_problems, len(self._problems))
        return await evaluate(self._rooms.generators, self._problems, most, self._config, self._stop_token_ids)

    async def _admit(self, group: asyncio.TaskGroup) -> None:
        per_step = self._config.buffer.prompts_per_step
        left = (self._config.learner.steps - self._first_step) * per_step
        while left > 0:
            slots = await self._slots.take(min(left, self._config.rollout.prompts_per_call))
            left -= len(slots)
            group.create_task(self._make_rollouts([self._prompts[slot] for slot in slots]))

    async def _make_rollouts(self, groups: Sequence[PromptGroup]) -> None:
        metas, rollouts = await self._rooms.generators.call("generate", groups, self._sampling)
        top_k = {"teacher": self._config.loss.teacher_top_k, "reference": self._config.loss.reference_top_k}
        answers = await asyncio.gather(
            *(pool.call("score", rollouts, top_k[role]) for role, pool in self._rooms.scorers.items())
        )
        scores = {role: ref for role, (_, ref) in zip(self._rooms.scorers, answers, strict=True)}
        await self._buffer.add([Entry(meta, row, rollouts, scores) for row, meta in enumerate(metas)])

    async def _learn(self, observers: Sequence[Observer]) -> None:
        for step in range(self._first_step, self._config.learner.steps):
            began = time.monotonic()
            entries = await self._buffer.take(step)
            waited = time.monotonic()
            trained = await self._train(step, entries)
            done = time.monotonic()
            await self.broadcast(step + 1)
            synced = time.monotonic()
            self._slots.free(self._buffer.slots_of(step))
            times = {"wait_s": waited - began, "train_s": done - waited, "weight_sync_s": synced - done}
            report = await self._report(step, entries, trained, times)
            for observer in observers:
                await observer.on_step(report)

    async def _train(self, step: int, entries: Sequence[Entry]) -> dict[str, float]:
        config = self._config.learner
        plans = plan_step(
            entries,
            step=step,
            num_ranks=config.num_ranks,
            micro_batch_tokens=config.micro_batch_tokens,
            packing=config.packing,
        )
        return (await self._rooms.learner.call_all("train_step", each=plans))[0]

    async def broadcast(self, version: int) -> None:
        """Sends the learner's weights to every generator, both sides at once."""
        manifest = dataclasses.replace(self._manifest, version=version)
        limit = self._config.weights.timeout_s
        await asyncio.gather(
            self._rooms.learner.call_all("send_weights", manifest, deadline_s=limit),
            self._rooms.generators.call_all("update_weights", manifest, deadline_s=limit),
        )

    async def _report(
        self, step: int, entries: Sequence[Entry], trained: dict[str, float], times: dict[str, float]
    ) -> StepReport:
        student: list[RolloutMeta] = [entry.meta for entry in entries if entry.meta.source == "student"]
        metrics = {f"learner/{name}": value for name, value in trained.items()}
        metrics |= {f"learner/{name}": value for name, value in times.items()}
        metrics |= rollout_metrics(student, version=step)
        metrics |= {
            "queue/slots_taken": self._slots.num_taken,
            "queue/buffer_slots": self._buffer.num_slots,
            **{f"queue/{room}_calls": pool.num_calls for room, pool in self._rooms.all.items()},
        }
        every, finished = self._config.evaluation.every_steps, step + 1
        last = finished == self._config.learner.steps
        during = every > 0 and finished % every == 0 and not last
        evaluation = await self.evaluate(self._config.evaluation.num_problems_during) if during else None
        return StepReport(finished, entries, metrics, evaluation)


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The failure that came first, out of a group of groups."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
