"""The loop, and the map of it.

    prompts ──slot──▶ GENERATE ──rollouts──▶ SCORE ──scored──▶ BUFFER ──step──▶ LEARN
       ▲            (student, teacher)  (teachers, reference)     ▲                │
       │                 ▲                                 golden ┘                │
       │                 └───────────────── weights v+1, broadcast ◀────────────────┤
       └──────────── a slot is freed when its step was trained and broadcast ◀──────┘

Two loops run in the driver at the same time and share nothing but slots and buffer:

``_admit``    takes free slots, asks generators for their rollouts, has them scored by teachers and
              reference at once, and puts them into the buffer. Waits for: free slots.
``_learn``    takes a step from the buffer, adds its golden rollouts, trains it on all learner ranks, broadcasts
              the new weights, frees the step's slots, evaluates when it is time, and lets the guard look.
              Waits for: a complete step.

The driver makes every call and therefore owns every object; payloads never pass through it.
Step ``s`` (0-based) trains weights of version ``s`` into version ``s + 1``. A failure in any room ends both
loops with its cause; so does the guard, when it orders to roll back or to stop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from opd_ray.batching import group_advantages, plan_step
from opd_ray.buffer import ReplayBuffer
from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.evaluate import Evaluation, evaluate
from opd_ray.guard import Guard, GuardEvent
from opd_ray.messages import Entry, PromptGroup, RolloutMeta, SamplingSettings, Source, WeightManifest
from opd_ray.metrics import rollout_metrics, teacher_rollout_metrics
from opd_ray.mixture import Mixture
from opd_ray.pool import Pool
from opd_ray.prompts import PromptStream
from opd_ray.scoring import roles_of, score_requests
from opd_ray.slots import Slots


@dataclasses.dataclass(frozen=True)
class Rooms:
    """The actors of a run, one pool per room."""

    generators: Pool
    learner: Pool
    scorers: Mapping[str, Pool]
    """Every teacher by its name, and "reference"; only those that the objective needs."""
    teacher_generators: Pool | None
    """None where the teacher writes no rollouts."""
    recorder: Pool
    """Writes the rollout log, and measures payloads so that they need not pass through the driver."""
    followers: Sequence[Pool] = ()
    """Scorers that take in the student's weights."""

    @property
    def all(self) -> dict[str, Pool]:
        teachers = {"teacher_generate": self.teacher_generators} if self.teacher_generators else {}
        return {"generate": self.generators, "learn": self.learner, **self.scorers, **teachers}


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


class GuardOrder(Exception):
    """The guard ends the loop: the run goes back to a healthy checkpoint, or stops."""

    def __init__(self, report: StepReport, order: str) -> None:
        super().__init__(order, report.step)
        self.report, self.order = report, order


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
        guard: Guard,
        first_step: int = 0,
    ) -> None:
        self._config, self._rooms, self._buffer, self._guard = config, rooms, buffer, guard
        self._prompts, self._problems = prompts, problems
        self._stop_token_ids, self._manifest = stop_token_ids, manifest
        self._first_step = first_step
        self._mixture = Mixture(config)
        self._requests = score_requests(config, stop_token_ids)
        self._slots = Slots(config.buffer.num_slots, first=first_step * config.buffer.prompts_per_step)

    async def run(self, observers: Sequence[Observer]) -> None:
        """Returns when the last step was broadcast and observed; raises a room's first failure, or GuardOrder."""
        try:
            async with asyncio.TaskGroup() as group:
                admit = group.create_task(self._admit(group), name="admit")
                await self._learn(observers)
                admit.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the step and the learner to go on with the same steps."""
        return {"golden_position": self._buffer.golden.position, "guard": self._guard.state()}

    async def evaluate(self, num_problems: int) -> Evaluation:
        """Held-out accuracy of the weights that the generators hold."""
        most = min(num_problems, len(self._problems))
        return await evaluate(
            self._rooms.generators,
            self._problems,
            most,
            self._config,
            self._stop_token_ids,
            teacher=self._rooms.scorers.get("teacher") if self._judges_evaluations() else None,
            recorder=self._rooms.recorder,
        )

    def _judges_evaluations(self) -> bool:
        """May the teacher's view of sampled answers be compared with the student's? At another temperature the
        student's is of another distribution, and one that is shown solutions is not asked without them."""
        return self._config.evaluation.temperature == 1 and not self._config.teacher.privileged

    async def broadcast(self, version: int) -> None:
        """Sends the learner's weights to every generator, and to scorers that follow the student, at once."""
        manifest = dataclasses.replace(self._manifest, version=version)
        limit = self._config.weights.timeout_s
        receivers = (self._rooms.generators, *self._rooms.followers)
        await asyncio.gather(
            self._rooms.learner.call_all("send_weights", manifest, deadline_s=limit),
            *(pool.call_all("update_weights", manifest, deadline_s=limit) for pool in receivers),
        )

    async def _admit(self, group: asyncio.TaskGroup) -> None:
        per_step = self._config.buffer.prompts_per_step
        next_slot, end = self._first_step * per_step, self._config.learner.steps * per_step
        while next_slot < end:
            # One call never spans two steps, which may differ in composition and length budget.
            most = min(per_step - next_slot % per_step, self._config.rollout.prompts_per_call)
            slots = await self._slots.take(most)
            next_slot += len(slots)
            group.create_task(self._fill(slots))

    async def _fill(self, slots: Sequence[int]) -> None:
        """Samples and scores every rollout of some slots of one step."""
        config = self._config
        per_step = config.buffer.prompts_per_step
        step, mix = slots[0] // per_step, self._mixture.at(slots[0] // per_step)
        prompts = [self._prompts[slot] for slot in slots]
        budget = SamplingSettings(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_response_tokens=config.rollout.budget(step),
            stop_token_ids=self._stop_token_ids,
            top_k=config.student_top_k,
        )
        teachers = dataclasses.replace(budget, temperature=config.rollout.teacher_temperature, top_p=1.0, top_k=0)
        calls = []
        # Prompts of one teacher go together, so that a payload has one route.
        for name in sorted({prompt.teacher for prompt in prompts}):
            routed = [prompt for prompt in prompts if prompt.teacher == name]
            student = _asking(routed, lambda _: mix.student_per_prompt)
            teacher = _asking(routed, lambda prompt: mix.teacher_responses(prompt.slot % per_step, per_step))
            if student:
                calls.append(self._sample(self._rooms.generators, "student", student, budget))
            # Only the first teacher writes; what it would write for another one's prompts is not that one's.
            if teacher and (name == "teacher" or config.loss.teachers == "weighted"):
                calls.append(self._sample(self._rooms.teacher_generators, "teacher", teacher, teachers))
        entries = await asyncio.gather(*calls)
        await self._buffer.add(slots, [entry for sampled in entries for entry in sampled])

    async def _sample(
        self, pool: Pool, source: Source, groups: Sequence[PromptGroup], sampling: SamplingSettings
    ) -> list[Entry]:
        """Scored rollouts of some prompts of one teacher, by one source; unwanted teacher rollouts are left out."""
        metas, rollouts = await pool.call("generate", groups, sampling)
        scores = await self._score(source, groups[0].teacher, rollouts)
        entries = [Entry(meta, row, rollouts, scores) for row, meta in enumerate(metas)]
        wanted = self._config.buffer.teacher_filter
        if source == "student" or wanted == "none":
            return entries
        return [entry for entry in entries if (entry.meta.correct if wanted == "correct" else not entry.meta.truncated)]

    async def _score(self, source: Source, teacher: str, rollouts: Any) -> dict[str, Any]:
        """Role to scores of a payload, from all that the source's loss compares with, at once."""
        requests = roles_of(self._config, self._requests[source], teacher)
        answers = await asyncio.gather(
            *(self._rooms.scorers[role].call("score", rollouts, request) for role, request in requests.items())
        )
        return {role: scores for role, (_, scores) in zip(requests, answers, strict=True)}

    async def _golden(self, step: int) -> list[Entry]:
        """The step's golden rollouts, scored if their loss compares with a model."""
        slots = self._buffer.slots_of(step)
        paired = self._config.buffer.golden_pairing == "prompt"
        prompt_ids = [self._prompts[slot].prompt_id for slot in slots] if paired else []
        num_golden = self._mixture.at(step, self._guard.strength).num_golden if len(self._buffer.golden) else 0
        entries = self._buffer.golden.take(num_golden, prompt_ids)
        if not self._requests.get("golden"):
            return entries
        scored: list[Entry] = []
        for name in sorted({entry.meta.teacher for entry in entries}):
            routed = [entry for entry in entries if entry.meta.teacher == name]
            rows = [entry.row for entry in routed]
            _, rollouts = await self._rooms.recorder.call("select", routed[0].rollouts, rows)
            scores = await self._score("golden", name, rollouts)
            scored += [Entry(entry.meta, row, rollouts, scores) for row, entry in enumerate(routed)]
        return scored

    async def _learn(self, observers: Sequence[Observer]) -> None:
        for step in range(self._first_step, self._config.learner.steps):
            began = time.monotonic()
            entries = await self._buffer.take(step) + await self._golden(step)
            waited = time.monotonic()
            trained, problem = await self._train(step, entries)
            done = time.monotonic()
            await self.broadcast(step + 1)
            synced = time.monotonic()
            self._slots.free(self._buffer.slots_of(step))
            times = {"wait_s": waited - began, "train_s": done - waited, "weight_sync_s": synced - done}
            report, order = await self._report(step, entries, trained, times, problem)
            for observer in observers:
                await observer.on_step(report)
            if order != "go on":
                raise GuardOrder(report, order)

    async def _train(self, step: int, entries: Sequence[Entry]) -> tuple[dict[str, float], str | None]:
        """Trains one step; its metrics, and what was not finite in it if anything was: then no weights were changed.
        Without a guard that ends the run."""
        config = self._config
        if not entries:
            raise RunError(
                f"step {step} has no rollouts to train on: its mixture is {self._mixture.at(step)}, and what the "
                f"teacher wrote had to pass buffer.teacher_filter={config.buffer.teacher_filter}; mix in more"
            )
        if config.loss.advantage.reward_coef > 0:
            entries = group_advantages(entries, config.loss.advantage.reward_std)
        plans = plan_step(
            entries,
            step=step,
            coefficients=self._mixture.coefficients(step, self._guard.strength),
            num_ranks=config.learner.num_ranks,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            packing=config.learner.packing,
        )
        outcome = (await self._rooms.learner.call_all("train_step", each=plans))[0]
        if outcome.problem and config.guard.level == "off":
            raise RunError(outcome.problem)
        return outcome.metrics, outcome.problem

    async def _report(
        self,
        step: int,
        entries: Sequence[Entry],
        trained: dict[str, float],
        times: dict[str, float],
        problem: str | None,
    ) -> tuple[StepReport, str]:
        student: list[RolloutMeta] = [entry.meta for entry in entries if entry.meta.source == "student"]
        budget = self._config.rollout.budget(step)
        metrics = {f"learner/{name}": value for name, value in (trained | times).items()}
        metrics |= rollout_metrics(student, version=step, budget=budget)
        metrics |= teacher_rollout_metrics([entry.meta for entry in entries if entry.meta.source == "teacher"])
        metrics |= {f"mixture/{name}": value for name, value in self._composition(step, entries).items()}
        metrics |= {
            "queue/slots_taken": self._slots.num_taken,
            "queue/buffer_slots": self._buffer.num_slots,
            **{f"queue/{room}_calls": pool.num_calls for room, pool in self._rooms.all.items()},
        }
        every, finished = self._config.evaluation.every_steps, step + 1
        last = finished == self._config.learner.steps
        during = every > 0 and finished % every == 0 and not last
        evaluation = await self.evaluate(self._config.evaluation.num_problems_during) if during else None
        verdict = self._guard.look(finished, metrics)
        events = [
            dataclasses.replace(event, action=f"{event.action} ({problem})")
            if problem and event.signal == "non_finite_loss"
            else event
            for event in verdict.events
        ]
        return StepReport(finished, entries, metrics, evaluation, events), verdict.order

    def _composition(self, step: int, entries: Sequence[Entry]) -> dict[str, float]:
        """What the step was made of, and with which weights."""
        counts = dict.fromkeys(self._config.sources, 0) | Counter(entry.meta.source for entry in entries)
        left_out = self._mixture.at(step).num_teacher - counts.get("teacher", 0)
        coefficients = dataclasses.asdict(self._mixture.coefficients(step, self._guard.strength))
        numbers = {f"{source}_rollouts": float(number) for source, number in counts.items()}
        if "teacher" in self._config.sources:
            numbers["teacher_left_out"] = float(left_out)
        return numbers | {
            f"{name}_coef": float(value) for name, value in coefficients.items() if name != "mask_truncated_tails"
        }


def _asking(prompts: Sequence[PromptGroup], responses: Any) -> list[PromptGroup]:
    """The prompts that get a response at all, with as many as ``responses(prompt)``."""
    asked = [dataclasses.replace(prompt, num_responses=responses(prompt)) for prompt in prompts]
    return [prompt for prompt in asked if prompt.num_responses]


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The failure that came first, out of a group of groups."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
