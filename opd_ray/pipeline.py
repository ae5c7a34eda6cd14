"""The loop, and the map of it.

    prompts ──slot──▶ GENERATE ──rollouts──▶ SCORE ──scored──▶ BUFFER ──step──▶ LEARN
       ▲            (student, teacher)  (teachers, reference)     ▲                │
       │                 ▲                                 golden ┘                │
       │                 └───────────────── weights v+1, broadcast ◀────────────────┤
       └──────────── a slot is freed when its step was trained and broadcast ◀──────┘

Two loops run in the driver at the same time and share nothing but slots and buffer:

``_admit``    takes free slots, asks generators for their rollouts, has them scored by teachers and
              reference at once, and puts them into the buffer. Waits for: free slots.
``_learn``    takes a step from the buffer, adds its golden rollouts (those of the next one are scored meanwhile),
              trains it on all learner ranks, broadcasts the new weights, frees the step's slots, evaluates when it is
              time, and lets the guard look. Waits for: a complete step.

The driver makes every call and therefore owns every object; payloads never pass through it.
Step ``s`` (0-based) trains weights of version ``s`` into version ``s + 1``. Workers may die at any moment: a pool gives
their calls to others, and rollouts that are gone with a node are made again, before or after they were in the buffer.
What cannot be mended here (a learner rank that is lost, a failure that would come again) ends both loops with its
cause; so does the guard, when it orders to roll back or to stop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from opd_ray.buffer.evidence import Evidence
from opd_ray.buffer.filling import Filling
from opd_ray.buffer.mixture import Mixture
from opd_ray.buffer.plan import group_advantages, plan_step
from opd_ray.buffer.replay import ReplayBuffer
from opd_ray.buffer.slots import Slots
from opd_ray.config import Config
from opd_ray.data.prompts import PromptStream
from opd_ray.errors import PayloadLost, RunError, first_failure
from opd_ray.evaluation.evaluate import Judges, evaluate
from opd_ray.evaluation.scores import Evaluation
from opd_ray.messages import Entry, StepOutcome
from opd_ray.rooms import Rooms
from opd_ray.rooms.together import until_whole
from opd_ray.status.state import Place, Whereabouts
from opd_ray.watch.guard import Guard
from opd_ray.watch.metrics import rollout_metrics, teacher_rollout_metrics
from opd_ray.watch.observers import EvaluationProgress, Observer, StepReport
from opd_ray.weights.delivery import Delivery


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
        problems: Mapping[str, PromptStream],
        stop_token_ids: tuple[int, ...],
        delivery: Delivery,
        guard: Guard,
        first_step: int,
        restored: Mapping[int, Sequence[Entry]],
        where: Whereabouts,
        say: Callable[..., None],
        evidence: Evidence | None = None,
    ) -> None:
        """``problems``: held-out ones, by set. ``restored``: slots that are scored already, and their rollouts.
        ``evidence``: where it decides what prompts are taught by.
        ``say(kind, text)`` tells of losses."""
        self._config, self._rooms, self._buffer, self._guard = config, rooms, buffer, guard
        self._prompts, self._problems = prompts, problems
        self._stop_token_ids, self._delivery = stop_token_ids, delivery
        self._first_step, self._restored = first_step, restored
        self._where, self._say = where, say
        self.between_steps = asyncio.Lock()
        """Held while a step is under way, its observers included; whoever has it sees the state after a whole step."""
        self.num_lost_payloads = 0
        """Payloads that were gone with a node and made again."""
        self._waited_s, self._waits_since = 0.0, None
        self._waits_for: int | None = None
        self._mixture = Mixture(config)
        self._evidence = evidence
        self._filling = Filling(
            config, rooms, prompts, self._mixture, stop_token_ids, self._lost, guard.horizon_at, evidence
        )
        self._slots = Slots(config.buffer.num_slots, first=first_step * config.buffer.prompts_per_step)

    async def run(self, observers: Sequence[Observer]) -> None:
        """Returns when the last step was broadcast and observed; raises a room's first failure, or GuardOrder."""
        entries = [entry for group in self._restored.values() for entry in group]
        await self._buffer.add(list(self._restored), entries)
        try:
            async with asyncio.TaskGroup() as group:
                admit = group.create_task(self._admit(group), name="admit")
                await self._learn(observers, group)
                admit.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the step, the learner and the buffer to go on with the same steps."""
        evidence = {"evidence": self._evidence.state()} if self._evidence else {}
        return {"golden_position": self._buffer.golden.position, "guard": self._guard.state(), **evidence}

    def buffered(self) -> tuple[tuple[int, ...], tuple[Entry, ...]]:
        """The slots that are scored, and their rollouts."""
        slots = self._buffer.slots
        return tuple(slots), tuple(entry for group in slots.values() for entry in group)

    def waited_s(self) -> float:
        """Seconds that the learner has waited for rollouts."""
        return self._waited_s + (time.monotonic() - self._waits_since if self._waits_since is not None else 0.0)

    def slots(self) -> tuple[Slots, list[int], dict[int, Place]]:
        """The ledger, the slots that the learner waits for, and where slots are that are not in the buffer."""
        missing = [] if self._waits_for is None else self._buffer.missing(self._waits_for)
        return self._slots, missing, dict.fromkeys(missing, "not admitted") | self._filling.places

    async def evaluate(self, most: int | None = None) -> Evaluation | None:
        """Held-out accuracy of the weights that the generators hold, on ``most`` problems of each set; None where
        nothing is evaluated."""
        config = self._config
        # Rooms may have one of another run, made for its prompts; one that is shown solutions is not asked without.
        asks = "teacher" in config.scorers and not config.teacher.privileged
        teacher = self._rooms.scorers["teacher"] if asks else None

        def make() -> Awaitable[Evaluation | None]:
            return evaluate(
                self._rooms.generators,
                self._problems,
                config,
                self._stop_token_ids,
                most=most,
                judges=Judges(teacher, self._rooms.recorder) if teacher else None,
                tell=EvaluationProgress(),
            )

        return await until_whole("answers of an evaluation", make, self._lost)

    async def broadcast(self, version: int) -> None:
        """Sends the learner's weights to every generator, and to scorers that follow the student, at once."""
        async with self._delivery.lock:
            await self._delivery.broadcast(version)

    async def _admit(self, group: asyncio.TaskGroup) -> None:
        per_step = self._config.buffer.prompts_per_step
        next_slot, end = self._first_step * per_step, self._config.learner.steps * per_step
        while next_slot < end:
            # One call never spans two steps, which may differ in composition and length budget.
            most = min(per_step - next_slot % per_step, self._config.rollout.prompts_per_call)
            slots = await self._slots.take(most)
            next_slot += len(slots)
            if new := [slot for slot in slots if slot not in self._restored]:
                group.create_task(self._fill(new))

    async def _fill(self, slots: Sequence[int]) -> None:
        """Puts every rollout of some slots of one step into the buffer."""
        await self._buffer.add(slots, await self._filling.of(slots))

    async def _learn(self, observers: Sequence[Observer], tasks: asyncio.TaskGroup) -> None:
        for step in range(self._first_step, self._config.learner.steps):
            began = time.monotonic()
            entries = await self._gather(step)
            async with self.between_steps:
                golden = self._filling.golden(step, self._buffer, self._guard.strength)
                if step + 1 < self._config.learner.steps:
                    self._filling.score_ahead(step + 1, self._buffer, self._guard.strength, tasks)
                waited = time.monotonic() - began
                entries, trained, times = await self._train_and_send(step, entries, golden)
                self._slots.free(self._buffer.slots_of(step))
                report = await self._report(
                    step, entries, trained.metrics, {"wait_s": waited, **times}, trained.problem
                )
                self._where.finish_step(report.step)
                self._where.enter("recording")
                for observer in observers:
                    await observer.on_step(report)
            if report.events and report.events[-1].level in ("rollback", "stop"):
                raise GuardOrder(report, report.events[-1].level)

    async def _gather(self, step: int) -> list[Entry]:
        """The step's rollouts from the buffer, when they are all there."""
        self._where.enter("waiting for rollouts")
        self._waits_for, self._waits_since = step, time.monotonic()
        try:
            return await self._buffer.take(step)
        finally:
            self._waited_s += time.monotonic() - self._waits_since
            self._waits_for = self._waits_since = None

    async def _train_and_send(
        self, step: int, entries: Sequence[Entry], golden: Sequence[Entry]
    ) -> tuple[list[Entry], StepOutcome, dict[str, float]]:
        """One step and the broadcast of what came of it; rollouts that are gone with a node are made again before."""
        lost: set[str] = set()

        async def attempt() -> tuple[list[Entry], StepOutcome, dict[str, float]]:
            nonlocal entries, lost
            entries, lost = await self._mended(entries, lost), set()
            every = [*entries, *(await self._filling.with_scores(step, golden))]
            if self._evidence:
                every = self._evidence.teach(step, every, self._mixture.coefficients(step, self._guard.strength))
            async with self._delivery.lock:  # nobody is sent the weights while they change
                self._where.enter("training")
                began = time.monotonic()
                outcome = await self._train(step, every)
                done = time.monotonic()
                if lost := set(outcome.lost):
                    raise PayloadLost(f"{sorted(lost)[:8]} were gone before it began")
                self._where.enter("broadcasting")
                await self._delivery.broadcast(step + 1)
                self._where.version = step + 1
            return every, outcome, {"train_s": done - began, "weight_sync_s": time.monotonic() - done}

        return await until_whole(
            f"step {step}: rollouts", attempt, lambda what: self._lost(what, number=max(1, len(lost)))
        )

    def _lost(self, what: str, number: int = 1) -> None:
        self.num_lost_payloads += number
        self._say("payload_lost", f"lost: {what}", number=number)

    async def _mended(self, entries: Sequence[Entry], lost: set[str]) -> Sequence[Entry]:
        """The entries, with new rollouts for every slot of which one is lost."""
        slots = sorted({entry.meta.slot for entry in entries if entry.meta.rollout_id in lost})
        if not slots:
            return entries
        self._where.enter("waiting for rollouts")
        fresh = await self._filling.of(slots)
        return sorted(
            [*(entry for entry in entries if entry.meta.slot not in slots), *fresh], key=lambda entry: entry.meta.slot
        )

    async def _train(self, step: int, entries: Sequence[Entry]) -> StepOutcome:
        """Trains one step. What was not finite in it changed no weights, and ends the run where there is no guard."""
        config = self._config
        entries = [entry for entry in entries if entry.is_trained_on]
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
            nodes=[member.node for member in self._rooms.learner.members],
        )
        try:
            outcome: StepOutcome = (await self._rooms.learner.call_all("train_step", each=plans))[0]
        except PayloadLost as error:  # noticed in the midst of the step, which cannot be begun again
            raise RunError(f"step {step}: {error}") from error
        if outcome.problem and config.guard.level == "off":
            raise RunError(outcome.problem)
        return outcome

    async def _report(
        self,
        step: int,
        entries: Sequence[Entry],
        trained: dict[str, float],
        times: dict[str, float],
        problem: str | None,
    ) -> StepReport:
        metas, rollout = [entry.meta for entry in entries], self._config.rollout
        mixture = self._mixture.composition(step, entries, self._guard.strength)
        if self._evidence:
            mixture |= self._evidence.learn(step, entries)
        metrics = {
            **{f"learner/{name}": value for name, value in (trained | times).items()},
            **rollout_metrics([meta for meta in metas if meta.source == "student"], step, rollout.budget(step)),
            **teacher_rollout_metrics([meta for meta in metas if meta.source == "teacher"]),
            **{f"mixture/{name}": value for name, value in mixture.items()},
            "queue/slots_taken": len(self._slots.taken),
            "queue/buffer_slots": len(self._buffer.slots),
            **{f"queue/{room}_calls": pool.num_calls for room, pool in self._rooms.all.items()},
        }
        finished = step + 1
        # Before the evaluation, during which slots that are free now are asked for: up to what horizon, it decides.
        events = [
            dataclasses.replace(event, action=f"{event.action} ({problem})")
            if problem and event.signal == "non_finite_loss"
            else event
            for event in self._guard.look(finished, metrics)
        ]
        every, evaluation = self._config.evaluation.every_steps, None
        if every and finished % every == 0 and finished < self._config.learner.steps:
            self._where.enter("evaluating")
            evaluation = await self.evaluate(self._config.evaluation.num_problems_during)
        return StepReport(finished, entries, metrics, evaluation, events)
