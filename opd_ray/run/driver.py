"""Drives one run to its end, over whatever is lost on the way.

A run is a row of attempts. Each begins with a state (the beginning, a checkpoint, a snapshot in memory), brings the
rooms into it and lets the pipeline go on from there. A worker that can be replaced is replaced within an attempt
(:mod:`opd_ray.placement.supervisor`); the loss of a state and a guard that orders to roll back end an attempt and begin
the next.
On SIGTERM and SIGINT the newest state in memory is saved, then that after the step under way, and the run ends.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.buffer.evidence import Evidence
from opd_ray.buffer.replay import ReplayBuffer
from opd_ray.config import Config
from opd_ray.data.rows import question
from opd_ray.disk import writing
from opd_ray.errors import GroupLost, Terminated, Unwritable, first_failure, only_said
from opd_ray.evaluation.scores import Evaluation
from opd_ray.messages import Entry, MemoryUse, RolloutMeta
from opd_ray.pipeline import GuardOrder, Pipeline
from opd_ray.placement import launch
from opd_ray.placement.restarts import Restarts
from opd_ray.placement.session import Session
from opd_ray.placement.supervisor import Supervisor
from opd_ray.plan.forecast import Forecast
from opd_ray.plan.show import short
from opd_ray.rooms.together import together, until_whole
from opd_ray.run.golden import GoldenRollouts
from opd_ray.run.preflight import Preflight
from opd_ray.run.records import Records
from opd_ray.run.signals import stop_signals
from opd_ray.run.status_writer import StatusWriter
from opd_ray.run.summary import SUMMARY, Summary, outcome
from opd_ray.snapshots import Checkpoint, Shelf, Snapshot, write_files
from opd_ray.snapshots.calls import FileCalls
from opd_ray.snapshots.keeper import Keeper
from opd_ray.status.state import Whereabouts
from opd_ray.watch.guard_of import guard_of
from opd_ray.watch.observers import (
    Metrics,
    Observer,
    Progress,
    RolloutLog,
    StepReport,
    VerdictLog,
    say_evaluation,
)
from opd_ray.watch.servers import ServerWatch
from opd_ray.weights.delivery import Delivery

_BUFFER_IS_OLD = "buffer_is_old"
"""In the state of a snapshot that the run was rolled back to: its rollouts are of the attempt that went astray."""


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
        start: Checkpoint | None,
        before: Evaluation | None,
    ) -> None:
        """``start``: the newest checkpoint on the shelf, if there is one. ``before``: the student's evaluation, where
        it is known already."""
        self._config, self._facts, self._run_dir = config, facts, run_dir
        self._session, self._shelf, self._observers, self._before = session, shelf, observers, before
        self._rooms = rooms = session.rooms(config, facts.max_context_tokens, facts.servers)
        self._golden = GoldenRollouts(config, facts.data.golden)
        self._guard = guard_of(config)
        self._guard_at_start = self._guard.state()
        self._where = where = Whereabouts(checkpoint_step=start.step if start else None)
        self._records = records = Records(config, run_dir, where, rooms)
        self._say = records.say
        self._summary = Summary(start.state.get("summary") if start else None)
        self._restarts = restarts = Restarts(config.recovery, self._summary.restarts)
        self._delivery = Delivery(config, rooms, self._say)
        self._log = RolloutLog(rooms.recorder, run_dir / "rollouts", config, self._asked())
        self._keeper = Keeper(
            config.checkpoint, config.learner.steps, rooms, shelf, self._state, where, self._say, self._log.settle
        )
        self._supervisor = Supervisor(
            config, rooms, self._delivery, restarts, self._say, save_soon=self._keeper.save_soon
        )
        self._servers = ServerWatch(config, rooms, self._say)
        self._status = StatusWriter(
            config,
            run_dir,
            rooms,
            where,
            self._supervisor,
            restarts,
            self._delivery,
            self._keeper,
            self._servers,
            far=None if shelf.storage.is_local else shelf.storage,
            live=lambda metrics: records.writer.port.live(metrics),
            say=self._say,
        )
        self._forecast = Forecast(config, facts, self._say)
        self._memory: dict[str, MemoryUse] = {}
        self._evidence: Evidence | None = None
        self._after: Evaluation | None = None
        self._begun = False
        """Have the rooms been told of this run, and are the groups still those that were?"""

    async def train(self, *, continued: bool) -> tuple[dict[str, Any], str | None]:
        """The summary, and why the guard stopped the run if it did. What has to be saved, said and closed is, however
        the run ends.

        ``continued`` says that an earlier start of it may have left files behind. Raises RunError for what recovery
        cannot mend, Terminated when a signal ended the run.
        """
        print(*self._facts.data.remarks(), short(self._forecast.outlook), sep="\n", flush=True)
        (self._run_dir / SUMMARY).unlink(missing_ok=True)  # of an earlier start, which was stopped
        await self._records.begin(self._where.checkpoint_step or 0, continued=continued)
        patience = self._config.deadlines.train_s
        reporting = asyncio.create_task(self._status.run(), name="status")
        servers = asyncio.create_task(self._servers.run(), name="servers")
        leased = asyncio.create_task(self._shelf.lease.keep(), name="lease")
        try:
            with stop_signals() as stopping:
                result = await self._to_the_end(leased, stopping)
            summary, why = result
            self._where.end("stopped" if why else "done", why or outcome(summary))
            return result
        except Terminated as error:
            self._where.end("stopped", str(error))
            patience = 0.0  # the grace time is over, or what was asked for is written
            with only_said("no summary"):
                self._finish(self._where.step, "signal")
            raise
        except Unwritable as error:
            with only_said("the state could not be saved"):
                await self._keeper.save_newest()
            text = f"{error}; {self._where.how_to_go_on(self._run_dir)}"
            self._where.end("failed", text)
            raise Unwritable(text) from error
        except BaseException as error:
            patience = 0.0 if isinstance(error, asyncio.CancelledError) else patience  # a second signal
            self._where.end("failed", str(error) or type(error).__name__)
            raise
        finally:
            reporting.cancel()
            servers.cancel()
            await self._keeper.close(patience)
            await self._log.settle(patience)
            leased.cancel()
            await self._status.close()
            await self._records.close()

    async def _to_the_end(
        self, leased: asyncio.Task[None], stopping: asyncio.Event
    ) -> tuple[dict[str, Any], str | None]:
        """One attempt after the other; beside each the supervisor keeps the rooms at strength, and a signal, or
        another driver that has taken the lease, may end it."""
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    beside = [
                        tasks.create_task(self._supervisor.run(), name="supervisor"),
                        tasks.create_task(self._end_on(stopping), name="signals"),
                        tasks.create_task(asyncio.wait_for(asyncio.shield(leased), None), name="superseded"),
                    ]
                    result = await self._attempt()
                    for task in beside:
                        task.cancel()
                return result
            except BaseExceptionGroup as failures:
                error = first_failure(failures)
            if isinstance(error, GroupLost):
                self._restart(error)
            elif isinstance(error, GuardOrder):
                await self._roll_back()
            else:
                raise error

    async def _attempt(self) -> tuple[dict[str, Any], str | None]:
        self._keeper.pipeline = None  # until the rooms hold a state there is none that a signal could save
        self._supervisor.learner_waited_s = None
        await self._bring_up()
        tell = partial(self._say, "snapshot_lost")
        snapshot = await until_whole("lost: arrays of the newest state", self._restored, tell)
        self._guard.restore(snapshot.state["guard"] if snapshot else self._guard_at_start)
        if (step := snapshot.step if snapshot else 0) < self._where.step:
            await self._log.settle(self._config.deadlines.train_s)  # of what is being forgotten
            await self._records.go_on(step, continued=True)
        self._summary.go_back(snapshot.state.get("summary") if snapshot else None)
        pipeline = self._pipeline(snapshot)
        await pipeline.broadcast(self._where.step)
        if self._summary.evaluated_before is None:
            self._summary.begin(self._before or await self._evaluate(pipeline))
            say_evaluation(self._say, "before", self._summary.evaluated_before)
        stopped = await self._steps(pipeline)
        await self._log.written()
        self._after = await self._evaluate(pipeline)
        say_evaluation(self._say, "after", self._after)
        self._memory = await self._rooms.memory()
        self._where.enter("exporting")
        await self._export()
        result = self._finish(stopped.step, "guard") if stopped else self._finish()
        self._where.enter("saving")
        await self._keeper.flush()
        return result, f"{stopped.events[-1]}; results so far are in {self._run_dir}" if stopped else None

    async def _bring_up(self) -> None:
        """Until every group is whole and every pool has its minimum."""
        began, limit = time.monotonic(), self._config.deadlines.start_s
        new = [room for room in self._rooms.every if not room.those("ready", "joining")]
        if new:
            print(f"starting {', '.join(f'{len(room)} {room.room}' for room in new)} actors", flush=True)
        await together(self._supervisor.wait_for_minimum(limit), launch.up(self._config, self._rooms))
        if new:
            self._say("rooms_up", f"all rooms are up after {time.monotonic() - began:.0f} s")

    async def _restored(self) -> Snapshot | None:
        """The newest state, which the rooms have then; None for the beginning."""
        snapshot = await self._keeper.newest()
        if snapshot is None or not self._begun:
            await self._begin()
        else:
            await launch.abandon(self._rooms)
        if snapshot is not None:
            await self._keeper.restore(snapshot)
        return snapshot

    async def _begin(self) -> None:
        """The student as it was before the first step, in rooms that may have had another run."""
        try:
            facts = self._facts
            await launch.begin(self._config, self._rooms, facts.eos_token_ids, facts.translations)
        except GroupLost:
            raise
        except Exception:
            self._session.close()  # rooms of which only some began are of no use to any run
            raise
        self._begun = True
        self._delivery.manifest = (await self._rooms.learner.call_all("manifest", 0))[0]
        await self._golden.load()

    def _pipeline(self, snapshot: Snapshot | None) -> Pipeline:
        """A pipeline that goes on from a snapshot, or from the beginning."""
        config = self._config
        step = snapshot.step if snapshot else 0
        golden = self._golden.from_the_first_on()
        restored: dict[int, list[Entry]] = {}
        if snapshot is not None:
            golden.position = snapshot.state["golden_position"]
            if not snapshot.state.get(_BUFFER_IS_OLD):
                # A smaller max_staleness than the run was saved with: what exceeds it is sampled anew.
                old = {entry.meta.slot for entry in snapshot.entries if self._too_old(entry.meta)}
                restored = {slot: [] for slot in snapshot.slots if slot not in old}
                for entry in snapshot.entries:
                    restored.get(entry.meta.slot, []).append(entry)
        self._where.step = self._where.version = step
        if config.buffer.evidence:
            self._evidence = Evidence(config, snapshot.state.get("evidence") if snapshot else None)
        pipeline = Pipeline(
            config=config,
            rooms=self._rooms,
            buffer=ReplayBuffer(config.buffer.prompts_per_step, golden),
            # A run that goes back samples other responses than those that led it astray.
            prompts=self._facts.data.prompt_stream(attempt=self._guard.state()["num_rollbacks"]),
            problems=self._facts.data.problem_streams(),
            stop_token_ids=self._facts.eos_token_ids,
            delivery=self._delivery,
            guard=self._guard,
            first_step=step,
            restored=restored,
            where=self._where,
            say=self._say,
            evidence=self._evidence,
        )
        self._keeper.pipeline = pipeline
        self._supervisor.learner_waited_s = pipeline.waited_s
        return pipeline

    def _too_old(self, meta: RolloutMeta) -> bool:
        """Will a rollout be older than ``buffer.max_staleness`` at the step that trains on it?"""
        buffer = self._config.buffer
        age = meta.slot // buffer.prompts_per_step - meta.oldest_version
        return meta.source == "student" and age > buffer.max_staleness

    async def _steps(self, pipeline: Pipeline) -> StepReport | None:
        """Runs the pipeline to its end; the report at which the guard stopped it, if so."""
        watching = [
            Metrics(self._records.writer, self._rooms, self._status.metrics),
            self._log,
            VerdictLog(self._run_dir),
            self._keeper,
            Progress(self._config.learner.steps, self._where.step, self._say),
            self._forecast,
        ]
        self._forecast.go_on()
        try:
            await pipeline.run([self._summary, *watching, *self._observers])
        except GuardOrder as end:
            if end.order != "stop":
                raise
            await launch.abandon(self._rooms)
            return end.report
        return None

    def _asked(self) -> Callable[[Entry], tuple[str, str]]:
        """The prompt's text and the expected answer of a rollout."""
        stream = self._facts.data.prompt_stream(attempt=0)  # the same rows in every attempt

        def of(entry: Entry) -> tuple[str, str]:
            if entry.meta.source == "golden":
                return self._golden.asked(entry.meta.rollout_id)
            row = stream.row(entry.meta.slot)
            return question(row), row["answer"]

        return of

    async def _export(self) -> None:
        """The trained student as a Hugging Face checkpoint in the run directory."""
        (_, files), *_ = await self._rooms.learner.call_all("export", payload=True)
        here = FileCalls(local=True, deadline_s=self._config.deadlines.train_s)
        await here(write_files, str(self._run_dir / "student"), files)

    def _finish(self, stopped_at: int | None = None, stopped_by: str | None = None) -> dict[str, Any]:
        """Writes summary.json; ``stopped_by``, where the run ends before its last step, is "guard" or "signal"."""
        result = self._summary.result(self._config, self._after)
        result |= {"prompts": self._facts.prompts, "golden": self._facts.golden, **self._records.provenance}
        result |= {"stopped_at": stopped_at, "stopped_by": stopped_by}
        result["weight_sync_bytes"] = self._delivery.num_bytes
        result["engine"] = self._config.rollout.engine_for(self._facts.sizes["student"].parameters)
        if self._evidence:
            result["evidence"] = self._evidence.map()
        result |= {"plan": self._forecast.result(self._memory)}
        with writing(path := self._run_dir / SUMMARY):
            path.write_text(json.dumps(result, indent=2) + "\n")
        self._records.tracking.summarise(result)
        return result

    # ---- what goes wrong ----

    def _restart(self, error: GroupLost) -> None:
        """Starts the actors of a group anew; the state that they held comes from the newest snapshot."""
        group = next(each for each in self._rooms.groups if each.room == error.room)
        now, step = time.monotonic(), self._where.step
        count = self._restarts.count_group(error, now, was_up=group.is_up, step=step)
        self._say("group_lost", f"lost: {error}; room {error.room} is started anew ({count})", room=error.room)
        self._where.enter("restoring")
        self._status.num_restores += 1
        group.restart()
        self._delivery.forget()
        self._begun = False

    async def _roll_back(self) -> None:
        """To the newest healthy state, with the guard's stronger setting."""
        self._where.enter("restoring")
        step = await self._keeper.newest_healthy()
        self._say("rollback", f"guard: going back to step {step}, with the stronger setting", step=step)
        self._guard.rolled_back(step)
        # A run that is killed from here on resumes with the stronger setting, too, and without the old rollouts.
        await self._keeper.back_to(step, {"guard": self._guard.state(), _BUFFER_IS_OLD: True})
        if step == 0:
            self._guard_at_start = self._guard.state()

    async def _end_on(self, stopping: asyncio.Event) -> None:
        """Waits for a signal, saves what there is and then the state after the step under way, and ends the run."""
        await stopping.wait()
        grace = self._config.checkpoint.grace_s
        self._say("signal", "a signal asks the run to end: saving after the step under way")
        try:
            async with asyncio.timeout(grace):
                with only_said("the state could not be saved"):
                    await self._keeper.save_now()
        except TimeoutError:
            print(f"the step under way could not be finished and saved within {grace:g} s", flush=True)
        raise Terminated(f"ended by a signal after step {self._where.step}; {self._where.how_to_go_on(self._run_dir)}")

    # ---- parts ----

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the pipeline's own state."""
        summary = self._summary.state()
        return {"summary": summary, "healthy": self._guard.healthy(), "config": configs.to_dict(self._config)}

    async def _evaluate(self, pipeline: Pipeline) -> Evaluation | None:
        self._where.enter("evaluating")
        if evaluation := await pipeline.evaluate():
            await self._records.evaluated(evaluation)
        return evaluation
