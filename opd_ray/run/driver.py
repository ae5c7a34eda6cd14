"""Drives one run to its end, over whatever is lost on the way.

A run is a row of attempts. Each begins with a state (the beginning, a checkpoint, a snapshot in memory), brings the
rooms into it and lets the pipeline go on from there. A worker that can be replaced is replaced within an attempt
(:mod:`opd_ray.placement.supervisor`); the loss of a state and a guard that orders to roll back end an attempt and begin
the next.
On SIGTERM and SIGINT the newest state in memory is saved, then that after the step under way, and the run ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.buffer.replay import ReplayBuffer
from opd_ray.config import Config, schedule
from opd_ray.errors import GroupLost, OpdError, RunError, Terminated, Unwritable, first_failure
from opd_ray.evaluate import Evaluation
from opd_ray.pipeline import GuardOrder, Pipeline
from opd_ray.placement import launch
from opd_ray.placement.restarts import Restarts
from opd_ray.placement.session import Session
from opd_ray.placement.supervisor import Supervisor
from opd_ray.rooms import Rooms
from opd_ray.rooms.threads import in_thread
from opd_ray.run.dataset import Materials
from opd_ray.run.preflight import Preflight
from opd_ray.run.reporter import Reporter
from opd_ray.run.signals import stop_signals
from opd_ray.run.summary import SUMMARY, Summary
from opd_ray.snapshots import Checkpoint, Shelf, Snapshot, write_files
from opd_ray.snapshots.calls import FileCalls
from opd_ray.snapshots.keeper import Keeper
from opd_ray.status.state import Whereabouts
from opd_ray.watch.disk import writing
from opd_ray.watch.events import Events
from opd_ray.watch.guard import Guard
from opd_ray.watch.metrics import MetricsWriter
from opd_ray.watch.observers import Metrics, Observer, Progress, RolloutLog, StepReport, say_evaluation
from opd_ray.weights.delivery import Delivery

_BUFFER_IS_OLD = "buffer_is_old"
"""In the state of a snapshot that the run was rolled back to: its rollouts are of the attempt that went astray."""
_MOST_IN_VAIN = 5
"""Losses of a group in a row without a step beyond those before."""


class Driver:
    """One run in rooms that are up, or that start with it."""

    def __init__(
        self,
        config: Config,
        facts: Preflight,
        run_dir: Path,
        session: Session,
        shelf: Shelf,
        observers: tuple[Observer, ...],
    ) -> None:
        self._config, self._facts, self._run_dir = config, facts, run_dir
        self._session, self._shelf, self._observers = session, shelf, observers
        self._guard = Guard(
            config.guard,
            has_golden=config.loads_golden,
            has_reference=config.loss.reference.used,
            configured=config.least_strength,
            student_coef=schedule.highest(config.loss.student.coef),
            rollouts_per_step=config.buffer.prompts_per_step * config.rollout.responses_per_prompt,
        )
        self._guard_at_start = self._guard.state()
        self._where = Whereabouts()
        self._events = Events(run_dir / "events.jsonl")
        self._materials = Materials(config, facts)
        self._writer: MetricsWriter | None = None
        self._after: Evaluation | None = None
        self._begun = False
        self._down_since: dict[str, float] = {}
        self._lost_at: dict[str, tuple[int, int]] = {}

    async def train(
        self, start: Checkpoint | None, before: Evaluation | None, *, continued: bool = False
    ) -> tuple[dict[str, Any], str | None]:
        """The summary, and why the guard stopped the run if it did.

        ``start`` is where the run goes on; ``continued`` says that an earlier start of it may have left files behind.
        Raises RunError for what recovery cannot mend, Terminated when a signal ended the run.
        """
        rooms = self._session.rooms(self._config, self._facts.max_context_tokens)
        self._summary = Summary(start.state.get("summary") if start else None)
        self._before = before
        (self._run_dir / SUMMARY).unlink(missing_ok=True)  # of an earlier start, which was stopped
        self._assemble(rooms)
        return await self._run(rooms, start, continued)

    def _assemble(self, rooms: Rooms) -> None:
        """Who looks after the rooms while they run."""
        recovery = self._config.recovery
        self._restarts = Restarts(recovery.max_restarts, self._summary.restarts)
        self._delivery = Delivery(
            self._config, rooms.learner, rooms.generators, list(rooms.followers.values()), self._say
        )
        self._supervisor = Supervisor(
            self._config, rooms.pools, self._groups(rooms), self._delivery, self._restarts, self._say
        )
        self._keeper = Keeper(
            self._config.checkpoint, self._config.learner.steps, rooms, self._shelf, self._state, self._where, self._say
        )
        self._reporter = Reporter(
            self._config,
            self._run_dir,
            rooms,
            self._where,
            self._supervisor,
            self._restarts,
            self._delivery,
            self._keeper,
            lambda metrics: self._writer.live(metrics),
            self._say,
        )

    async def _run(self, rooms: Rooms, start: Checkpoint | None, continued: bool) -> tuple[dict[str, Any], str | None]:
        """To the end of the run, whatever it is: what has to be saved, said and closed then is."""
        self._where.checkpoint_step = start.step if start else None
        await in_thread(self._go_back_to, start.step if start else 0, continued)
        patience = self._config.deadlines.train_s
        reporting = asyncio.create_task(self._reporter.run(), name="status")
        self._lease = asyncio.create_task(self._shelf.lease.keep(), name="lease")
        try:
            with stop_signals() as stopping:
                result = await self._to_the_end(rooms, functools.partial(self._keeper.open, start), stopping)
            self._where.enter("done")
            return result
        except Terminated as error:
            self._where.end("stopped", str(error))
            patience = 0.0  # the grace time is over, or what was asked for is written
            try:
                self._finish(self._where.step, "signal")
            except Unwritable as failure:
                print(failure, flush=True)
            raise
        except Unwritable as error:
            await self._try_to_save(self._keeper.save_newest())
            text = f"{error}; {self._where.how_to_go_on(self._run_dir)}"
            self._where.end("failed", text)
            raise Unwritable(text) from error
        except BaseException as error:
            self._where.end("failed", str(error) or type(error).__name__)
            raise
        finally:
            reporting.cancel()
            await self._keeper.close(patience)
            self._lease.cancel()
            await self._reporter.close()
            await in_thread(self._writer.close)

    @staticmethod
    def _groups(rooms: Rooms) -> list[Any]:
        return [rooms.learner, *rooms.followers.values()]

    async def _to_the_end(
        self, rooms: Rooms, find: Callable[[], Awaitable[Snapshot | None]], stopping: asyncio.Event
    ) -> tuple[dict[str, Any], str | None]:
        """One attempt after the other; ``find`` gives the state that the next one begins with."""
        while True:
            try:
                return await self._tended(self._attempt(rooms, find), stopping)
            except GroupLost as error:
                self._restart(rooms, error)
                find = self._keeper.newest
            except GuardOrder:
                find = functools.partial(_at_hand, await self._roll_back())

    async def _tended(self, work: Awaitable[Any], stopping: asyncio.Event) -> Any:
        """``work``, while the supervisor keeps the rooms at strength and a signal may end it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [
                    tasks.create_task(self._supervisor.run(), name="supervisor"),
                    tasks.create_task(self._end_on(stopping), name="signals"),
                    tasks.create_task(_outcome(self._lease), name="superseded"),
                ]
                result = await work
                for task in others:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        return result

    async def _attempt(
        self, rooms: Rooms, find: Callable[[], Awaitable[Snapshot | None]]
    ) -> tuple[dict[str, Any], str | None]:
        self._keeper.pipeline = None  # until the rooms hold a state there is none that a signal could save
        self._supervisor.learner_waited_s = None
        await self._bring_up(rooms)
        snapshot = await find()
        if snapshot is None or not self._begun:
            await self._begin(rooms)
        else:
            await launch.abandon(rooms)
        if snapshot is not None:
            snapshot = await self._keeper.restore(snapshot)
            if snapshot is None:
                await self._begin(rooms)
        self._guard.restore(snapshot.state["guard"] if snapshot else self._guard_at_start)
        if (step := snapshot.step if snapshot else 0) < self._where.step:
            await in_thread(self._go_back_to, step, True)
        self._summary.go_back(snapshot.state.get("summary") if snapshot else None)
        pipeline = self._pipeline(rooms, snapshot)
        await pipeline.broadcast(self._where.step)
        if self._summary.evaluated_before is None:
            self._summary.begin(self._before or await self._evaluate(pipeline))
            say_evaluation("before", self._summary.evaluated_before)
        stopped = await self._steps(rooms, pipeline)
        self._after = await self._evaluate(pipeline)
        say_evaluation("after", self._after)
        self._where.enter("exporting")
        await self._export(rooms)
        result = self._finish(stopped.step, "guard") if stopped else self._finish()
        why = f"{stopped.events[-1]}; results so far are in {self._run_dir}" if stopped else None
        self._where.enter("saving")
        await self._keeper.flush(patient=True)
        return result, why

    async def _bring_up(self, rooms: Rooms) -> None:
        """Until every group is whole and every pool has its minimum."""
        began, limit = time.monotonic(), self._config.deadlines.start_s
        new = [room for room in self._groups(rooms) if not room.is_up]
        new += [pool for pool in rooms.pools if not pool.those("ready", "joining")]
        if new:
            print(f"starting {', '.join(f'{len(room)} {room.room}' for room in new)} actors", flush=True)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._supervisor.wait_for_minimum(limit))
            tasks.create_task(launch.up(self._config, rooms))
        if new:
            print(f"all rooms are up after {time.monotonic() - began:.0f} s", flush=True)

    async def _begin(self, rooms: Rooms) -> None:
        """The student as it was before the first step, in rooms that may have had another run."""
        try:
            await launch.begin(self._config, rooms, self._facts.eos_token_ids)
        except GroupLost:
            raise
        except Exception:
            self._session.close()  # rooms of which only some began are of no use to any run
            raise
        self._begun = True
        self._delivery.manifest = (await rooms.learner.call_all("manifest", 0))[0]
        await self._materials.load()

    def _pipeline(self, rooms: Rooms, snapshot: Snapshot | None) -> Pipeline:
        """A pipeline that goes on from a snapshot, or from the beginning."""
        config = self._config
        step = snapshot.step if snapshot else 0
        golden = self._materials.golden()
        restored: dict[int, list[Any]] = {}
        if snapshot is not None:
            golden.position = snapshot.state["golden_position"]
            if not snapshot.state.get(_BUFFER_IS_OLD):
                restored = {slot: [] for slot in snapshot.slots}
                for entry in snapshot.entries:
                    restored[entry.meta.slot].append(entry)
                # A smaller max_staleness than the run was saved with: what exceeds it is sampled anew.
                restored = {slot: group for slot, group in restored.items() if not self._too_old(slot, group)}
        self._where.step = self._where.version = step
        pipeline = Pipeline(
            config=config,
            rooms=rooms,
            buffer=ReplayBuffer(config.buffer.prompts_per_step, golden),
            # A run that goes back samples other responses than those that led it astray.
            prompts=self._materials.prompts(attempt=self._guard.state()["num_rollbacks"]),
            problems=self._materials.problems(),
            stop_token_ids=self._facts.eos_token_ids,
            delivery=self._delivery,
            guard=self._guard,
            first_step=step,
            restored=restored,
            where=self._where,
            say=self._say,
        )
        self._keeper.pipeline = pipeline
        self._supervisor.learner_waited_s = pipeline.waited_s
        return pipeline

    def _too_old(self, slot: int, group: Sequence[Any]) -> bool:
        """Will a slot's rollouts be older than ``buffer.max_staleness`` at the step that trains on them?"""
        buffer = self._config.buffer
        versions = [entry.meta.oldest_version for entry in group if entry.meta.source == "student"]
        return bool(versions) and slot // buffer.prompts_per_step - min(versions) > buffer.max_staleness

    async def _steps(self, rooms: Rooms, pipeline: Pipeline) -> StepReport | None:
        """Runs the pipeline to its end; the report at which the guard stopped it, if so."""
        watching = [
            Metrics(self._writer, rooms, self._reporter.metrics),
            RolloutLog(rooms.recorder, self._run_dir / "rollouts", self._config.metrics),
            self._keeper,
            Progress(self._run_dir, self._config.learner.steps, self._where.step, self._say),
        ]
        try:
            await pipeline.run([self._summary, *watching, *self._observers])
        except GuardOrder as end:
            if end.order != "stop":
                raise
            await launch.abandon(rooms)
            return end.report
        return None

    async def _export(self, rooms: Rooms) -> None:
        """The trained student as a Hugging Face checkpoint in the run directory."""
        (_, files), *_ = await rooms.learner.call_all_for_payloads("export")
        here = FileCalls(local=True, deadline_s=self._config.deadlines.train_s)
        await here(write_files, str(self._run_dir / "student"), files)

    def _finish(self, stopped_at: int | None = None, stopped_by: str | None = None) -> dict[str, Any]:
        """Writes summary.json; ``stopped_by``, where the run ends before its last step, is "guard" or "signal"."""
        result = self._summary.result(self._config, self._after)
        result |= {"golden": self._materials.golden_report, "stopped_at": stopped_at, "stopped_by": stopped_by}
        result |= {"restarts": sum(self._restarts.by_room.values()), "restarts_by_room": dict(self._restarts.by_room)}
        with writing(path := self._run_dir / SUMMARY):
            path.write_text(json.dumps(result, indent=2) + "\n")
        return result

    # ---- what goes wrong ----

    def _restart(self, rooms: Rooms, error: GroupLost) -> None:
        """Starts the actors of a group anew; the state that they held comes from the newest snapshot."""
        group = rooms.learner if error.room == "learn" else rooms.followers[error.room]
        now, limit = time.monotonic(), self._config.recovery.below_min_s
        since = self._down_since.setdefault(error.room, now) if not group.is_up else now
        if now - since > limit:
            raise RunError(
                f"{error.room}: was not whole for more than {limit:g} s (recovery.below_min_s); the last loss: "
                f"{error}; see that the cluster has a place for it, and go on with --resume"
            ) from error
        self._down_since[error.room] = since
        furthest, losses = self._lost_at.get(error.room, (-1, 0))
        losses = 1 if self._where.step > furthest else losses + 1
        self._lost_at[error.room] = (max(furthest, self._where.step), losses)
        if losses > _MOST_IN_VAIN:
            raise RunError(
                f"{error.room}: was lost {losses} times without getting beyond step {furthest}; the last: {error}; "
                "mend the cause and go on with --resume"
            ) from error
        count = self._restarts.count(error.room, str(error), now)
        self._say("group_lost", f"lost: {error}; room {error.room} is started anew ({count})", room=error.room)
        self._where.enter("restoring")
        self._reporter.num_restores += 1
        group.restart()
        self._delivery.forget()
        self._begun = False

    async def _roll_back(self) -> Snapshot | None:
        """The newest healthy state, with the guard's stronger setting."""
        self._where.enter("restoring")
        snapshot = await self._keeper.newest(healthy=True)
        step = snapshot.step if snapshot else 0
        self._say("rollback", f"guard: going back to step {step}, with the stronger setting", step=step)
        self._guard.rolled_back(step)
        # A run that is killed from here on resumes with the stronger setting, too, and without the old rollouts.
        changes = {"guard": self._guard.state(), _BUFFER_IS_OLD: True}
        await self._keeper.back_to(step, changes)
        if snapshot is None:
            self._guard_at_start = self._guard.state()
        return dataclasses.replace(snapshot, state=snapshot.state | changes) if snapshot else None

    async def _end_on(self, stopping: asyncio.Event) -> None:
        """Waits for a signal, saves what there is and then the state after the step under way, and ends the run."""
        await stopping.wait()
        grace = self._config.checkpoint.grace_s
        print("a signal asks the run to end: saving after the step under way", flush=True)
        try:
            async with asyncio.timeout(grace):
                await self._try_to_save(self._keeper.save_now())
        except TimeoutError:
            print(f"the step under way could not be finished and saved within {grace:g} s", flush=True)
        raise Terminated(f"ended by a signal after step {self._where.step}; {self._where.how_to_go_on(self._run_dir)}")

    async def _try_to_save(self, saving: Awaitable[None]) -> None:
        """What cannot be saved is said: the run ends for another reason."""
        try:
            await saving
        except OpdError as error:
            print(f"the state could not be saved: {error}", flush=True)

    # ---- parts ----

    def _say(self, kind: str, text: str, **fields: Any) -> None:
        fields.setdefault("step", self._where.step)
        self._events.say(kind, text, **{"version": self._where.version, **fields})

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the pipeline's own state."""
        summary = self._summary.state() | {"restarts": dict(self._restarts.by_room)}
        return {"summary": summary, "healthy": self._guard.healthy(), "config": configs.to_dict(self._config)}

    def _go_back_to(self, step: int, continued: bool) -> None:
        """Metrics and rollout log go on after ``step``; what they have of later steps does not count."""
        if self._writer is not None:
            self._writer.close()
        self._writer = MetricsWriter(self._run_dir, step, continued=continued, steps=self._config.learner.steps)
        for path in (self._run_dir / "rollouts").glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    async def _evaluate(self, pipeline: Pipeline) -> Evaluation | None:
        if self._config.evaluation.num_problems == 0:
            return None
        self._where.enter("evaluating")
        evaluation = await pipeline.evaluate(self._config.evaluation.num_problems)
        await in_thread(self._writer.write, self._where.step, evaluation.metrics())
        return evaluation


async def _outcome(task: asyncio.Task[None]) -> None:
    """Raises what the task raises; the task goes on where whoever waits for it is cancelled."""
    await asyncio.shield(task)


async def _at_hand(snapshot: Snapshot | None) -> Snapshot | None:
    return snapshot
