"""Keeps the states that a run can go back to: the newest in Ray's object store, some of them on the shelf.

Taking a snapshot is quick: every learner rank copies its share of the state to its host's memory, and the buffer's
rollouts are there already. Writing one goes on in the background while the loop trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from opd_ray.config import CheckpointConfig
from opd_ray.errors import DeadlineError, OpdError, PayloadLost, StorageUnavailable
from opd_ray.pipeline import Pipeline
from opd_ray.rooms import Rooms
from opd_ray.snapshots import Shelf, Snapshot
from opd_ray.status.state import Whereabouts
from opd_ray.watch.observers import StepReport

_AGAIN_S = 20.0
"""Pause before a write is tried again."""


class LatestWriter:
    """One task that writes the snapshot that it was given last.

    Whoever gives it one waits for the first try at the one before. While the storage does not answer nobody waits, and
    a newer snapshot takes the place of the one that is tried again, for ``retry_s`` at most.
    """

    def __init__(
        self, write: Callable[[Snapshot], Awaitable[None]], retry_s: float, say: Callable[[str, str], None]
    ) -> None:
        self._write, self._retry_s, self._say = write, retry_s, say
        self.num_failed = self.num_skipped = 0
        self._due: Snapshot | None = None
        self._tried: Snapshot | None = None
        """Was not written at its first try."""
        self._task: asyncio.Task[None] | None = None
        self._free = asyncio.Event()
        """Nothing is being written, or it failed already."""
        self._free.set()
        self._hurry = asyncio.Event()
        """Somebody waits for the end."""

    async def put(self, snapshot: Snapshot) -> None:
        """Raises what went wrong with the one before."""
        await self._free.wait()
        self.check()
        if self._due is not None and self._due is not self._tried:
            self.num_skipped += 1
        self._due = snapshot
        if self._task is None:
            self._free.clear()
            self._task = asyncio.create_task(self._work(), name="write a checkpoint")

    def check(self) -> None:
        """Raises what has ended the task, once."""
        if self._task is not None and self._task.done():
            done, self._task = self._task, None
            done.result()

    async def flush(self, *, patient: bool) -> None:
        """Waits until nothing is being written; each that waits gets what went wrong. What waits to be tried again is
        tried once more, at once, or, if ``patient``, for as long as ``retry_s`` allows."""
        if (task := self._task) is None:
            return
        if not patient:
            self._hurry.set()
        try:
            await asyncio.wait([task])
        finally:
            if not patient:
                self._hurry.clear()
        if self._task is task:
            self._task = None
        task.result()

    async def _work(self) -> None:
        gives_up_at = None
        try:
            while (snapshot := self._due) is not None:
                if self._tried is not None and self._tried is not snapshot:
                    self.num_skipped += 1
                self._tried = snapshot
                if gives_up_at is None:
                    self._free.clear()
                try:
                    await self._write(snapshot)
                except (StorageUnavailable, DeadlineError) as error:
                    self.num_failed += 1
                    gives_up_at = gives_up_at or time.monotonic() + self._retry_s
                    if self._hurry.is_set() or time.monotonic() >= gives_up_at:
                        raise
                    self._say("checkpoint_failed", f"checkpoint: step {snapshot.step} is tried again: {error}")
                    self._free.set()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._hurry.wait(), _AGAIN_S)
                else:
                    gives_up_at = self._tried = None
                    self._due = None if self._due is snapshot else self._due
        finally:
            self._due = self._tried = None
            self._free.set()


class Keeper:
    """An observer that takes snapshots, and the source of every restore."""

    def __init__(
        self,
        config: CheckpointConfig,
        last_step: int,
        rooms: Rooms,
        shelf: Shelf,
        state: Callable[[], dict[str, Any]],
        where: Whereabouts,
        say: Callable[..., None],
        logged: Callable[[], Awaitable[None]],
    ) -> None:
        """``state`` gives what belongs into a checkpoint besides the pipeline's own state. ``logged`` waits for the
        rollout log: a run that goes on from a checkpoint does not write the steps before it again."""
        self._config, self._last_step, self._rooms, self._shelf = config, last_step, rooms, shelf
        self._state, self._where, self._say, self._logged = state, where, say, logged
        self.pipeline: Pipeline | None = None
        """What is at work, an attempt after the other; None while the rooms hold no state that could be saved."""
        self._written: dict[str, float] = {}
        self._newest: Snapshot | None = None
        self._writer = LatestWriter(self._write, config.retry_s, say)
        self._asked = False
        """Has the state after the step under way to be written, whatever is configured?"""
        self._ending = False
        """Is ``save_now`` about to end the run?"""

    async def on_step(self, report: StepReport) -> None:
        every, in_memory = self._config.every_steps, self._config.memory_every_steps
        asked, self._asked = self._asked, False
        due = asked or (every > 0 and (report.step % every == 0 or report.step == self._last_step))
        self._writer.check()
        if due or (in_memory and report.step % in_memory == 0):
            snapshot = await self._take(report.step)
            if due:
                await self._writer.put(snapshot)

    async def _take(self, step: int) -> Snapshot:
        """The state after ``step`` steps, between two of them."""
        state = self._state() | self.pipeline.state()
        slots, entries = self.pipeline.buffered()
        parts = await self._rooms.learner.call_all("snapshot", payload=True)
        followers = {role: await group.call("snapshot") for role, group in self._rooms.followers.items()}
        snapshot = Snapshot(step, parts[0][0], tuple(part for _, part in parts), followers, slots, entries, state)
        if self._config.memory_every_steps:
            self._newest = snapshot
        return snapshot

    async def _write(self, snapshot: Snapshot) -> None:
        """Puts a snapshot on the shelf. One that is gone with its node is left out; other failures are raised."""
        await self._logged()
        began = time.monotonic()
        try:
            checkpoint = await self._shelf.write(snapshot, self._config.keep)
        except PayloadLost as error:
            self._say("checkpoint_lost", f"checkpoint: that of step {snapshot.step} is left out: {error}")
            self._writer.num_skipped += 1
            return
        self._where.checkpoint_step = step = snapshot.step
        took, size = time.monotonic() - began, sum(file.num_bytes for file in checkpoint.files.values())
        text = f"checkpoint: that of step {step} is written ({size / 1e6:,.1f} MB in {took:.1f} s)"
        self._say("checkpoint", text, step=step, num_bytes=size, write_s=took)
        self._written = {"checkpoint/step": float(step), "checkpoint/write_s": took, "checkpoint/bytes": float(size)}

    @property
    def metrics(self) -> dict[str, float]:
        """How many writes failed, how many were never made, and of the checkpoint that was written last."""
        counts = {"failed_writes": self._writer.num_failed, "skipped": self._writer.num_skipped}
        return {f"checkpoint/{name}": float(count) for name, count in counts.items()} | self._written

    async def flush(self) -> None:
        """Waits until all that is due is written; raises what went wrong."""
        try:
            await self._writer.flush(patient=True)
        except OpdError:
            if self._ending:  # what ends the run saves, too, and says how that went
                await asyncio.get_running_loop().create_future()
            raise

    async def _settle(self) -> None:
        """Waits until nothing is being written, whether it succeeds or not."""
        try:
            await self._writer.flush(patient=False)
        except OpdError as error:
            self._say("checkpoint_failed", f"checkpoint: {error}")

    # ---- going back ----

    async def newest(self) -> Snapshot | None:
        """The newest state to go back to, from memory if it is there; None where there is only the beginning."""
        if self._newest is not None:
            return self._newest
        await self.flush()
        checkpoint = await self._shelf.latest()
        if checkpoint is None:
            return None
        self._where.checkpoint_step = checkpoint.step
        return await self._shelf.read(checkpoint)

    async def newest_healthy(self) -> int:
        """The step of the newest state that no alarm speaks against; 0 where there is none."""
        if self._newest is not None and self._newest.state["healthy"]:
            return self._newest.step
        await self._settle()  # of one that is being written nobody knows whether it is of use
        checkpoint = await self._shelf.latest(healthy=True)
        return checkpoint.step if checkpoint else 0

    async def back_to(self, step: int, changes: dict[str, Any]) -> None:
        """Forgets what is later than ``step``, and writes ``changes`` into the state of the newest that is left."""
        await self._settle()
        await self._shelf.discard_after(step)
        if self._newest is not None:
            kept = self._newest.step <= step
            self._newest = dataclasses.replace(self._newest, state=self._newest.state | changes) if kept else None
        left = await self._shelf.latest()
        self._where.checkpoint_step = left.step if left else None
        if left is not None:
            await self._shelf.amend(left, changes)

    async def restore(self, snapshot: Snapshot) -> None:
        """Learner and followers go on from ``snapshot``. Raises PayloadLost where it is gone from memory with a node;
        then the newest is that on the shelf."""
        try:
            await self._rooms.learner.call_all("restore", snapshot.learner_facts, list(snapshot.learner_parts))
            for role, (facts, arrays) in snapshot.followers.items():
                if role in self._rooms.followers:
                    await self._rooms.followers[role].call_all("restore", facts, arrays)
        except PayloadLost:
            self._newest = None
            raise

    async def save_soon(self) -> None:
        """A node that holds a part of the state is about to go, and with it what is in memory there: puts the newest
        state in memory on the shelf, then that after the step under way. The run goes on meanwhile."""
        self._asked = True
        await self._settle()
        if (snapshot := self._unsaved()) is not None:
            await self._writer.put(snapshot)

    # ---- the end ----

    async def save_now(self) -> None:
        """Puts the newest state on the shelf, for good: at once that in memory, for the step under way may not end in
        time; then, unless a state is being restored, that after this step. No other step begins."""
        self._ending = True
        if self.pipeline is None:
            await self.save_newest()
            return
        between = self.pipeline.between_steps
        boundary = asyncio.ensure_future(between.acquire())
        try:
            if between.locked():
                try:
                    await self.save_newest()
                except OpdError as error:  # that after the step is tried all the same
                    self._say("checkpoint_failed", f"checkpoint: {error}")
            await boundary
        finally:
            boundary.cancel()
        self._where.enter("saving")
        await self._settle()
        if self._where.checkpoint_step != self._where.step:
            await self._write(await self._take(self._where.step))

    async def save_newest(self) -> None:
        """Puts the newest state in memory on the shelf, unless one that is as new is there."""
        await self._settle()
        if (snapshot := self._unsaved()) is not None:
            await self._write(snapshot)

    def _unsaved(self) -> Snapshot | None:
        """The newest state in memory, unless one that is as new is on the shelf."""
        saved, snapshot = self._where.checkpoint_step, self._newest
        return snapshot if snapshot is not None and (saved is None or snapshot.step > saved) else None

    async def close(self, limit_s: float) -> None:
        """Waits for what is being written, whether it succeeds or not, but not for longer than ``limit_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._settle()
