"""Keeps the states that a run can go back to: the newest in Ray's object store, some of them on the shelf.

Taking a snapshot is quick: every learner rank copies its share of the state to its host's memory, and the buffer's
rollouts are there already. Writing one goes on in the background while the loop trains; the next one waits for it.
While the storage does not answer the loop trains on, and the newest that is due is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from opd_ray.config import CheckpointConfig
from opd_ray.errors import DeadlineError, OpdError, PayloadLost, StorageUnavailable
from opd_ray.pipeline import Pipeline
from opd_ray.rooms import Rooms
from opd_ray.snapshots import Checkpoint, Shelf, Snapshot
from opd_ray.status.state import Whereabouts
from opd_ray.watch.observers import StepReport

_AGAIN_S = 20.0
"""Pause before a write is tried again."""


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
    ) -> None:
        """``state`` gives what belongs into a checkpoint besides the pipeline's own state."""
        self._config, self._last_step, self._rooms, self._shelf = config, last_step, rooms, shelf
        self._state, self._where, self._say = state, where, say
        self.pipeline: Pipeline | None = None
        """What is watched; set by whoever makes it."""
        self.metrics: dict[str, float] = {"checkpoint/failed_writes": 0.0}
        """How many writes failed, and of the checkpoint that was written last."""
        self._newest: Snapshot | None = None
        self._due: Snapshot | None = None
        self._writing: asyncio.Task[None] | None = None
        self._may_go_on = asyncio.Event()
        """Nothing is being written, or it failed already: the loop does not wait for a storage that does not answer."""
        self._may_go_on.set()
        self._ending = False
        """Is ``save_now`` about to end the run?"""
        self._hurry = asyncio.Event()
        """Somebody waits for the end of the writing."""

    async def on_step(self, report: StepReport) -> None:
        every, in_memory = self._config.every_steps, self._config.memory_every_steps
        due = every > 0 and (report.step % every == 0 or report.step == self._last_step)
        self._raise_failure()
        if due or (in_memory and report.step % in_memory == 0):
            snapshot = await self.take(report.step)
            if due:
                await self._may_go_on.wait()
                self._raise_failure()
                self._due = snapshot
                if self._writing is None:
                    self._may_go_on.clear()
                    self._writing = asyncio.create_task(self._write_due(), name="write a checkpoint")

    async def take(self, step: int) -> Snapshot:
        """The state after ``step`` steps, between two of them."""
        state = self._state() | self.pipeline.state()
        slots, entries = self.pipeline.buffered()
        parts = await self._rooms.learner.call_all_for_payloads("snapshot")
        followers = {role: await group.call("snapshot") for role, group in self._rooms.followers.items()}
        snapshot = Snapshot(
            step=step,
            learner_facts=parts[0][0],
            learner_parts=tuple(part for _, part in parts),
            followers=followers,
            slots=slots,
            entries=entries,
            state=state,
        )
        if self._config.memory_every_steps:
            self._newest = snapshot
        return snapshot

    async def _write_due(self) -> None:
        """Writes the newest snapshot that is due; again while the storage does not answer, for ``retry_s`` at most."""
        failing_since: float | None = None
        try:
            while self._due is not None:
                snapshot = self._due
                if failing_since is None:
                    self._may_go_on.clear()
                try:
                    await self.write(snapshot)
                except (StorageUnavailable, DeadlineError) as error:
                    self.metrics["checkpoint/failed_writes"] += 1
                    now = time.monotonic()
                    failing_since = now if failing_since is None else failing_since
                    if self._hurry.is_set() or now - failing_since >= self._config.retry_s:
                        raise
                    self._say("checkpoint_failed", f"checkpoint: step {snapshot.step} is tried again: {error}")
                    self._may_go_on.set()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._hurry.wait(), _AGAIN_S)
                else:
                    failing_since = None
                    if self._due is snapshot:
                        self._due = None
        finally:
            self._due = None
            self._may_go_on.set()

    async def write(self, snapshot: Snapshot) -> None:
        """Puts a snapshot on the shelf. One that is gone with its node is left out; other failures are raised."""
        began = time.monotonic()
        try:
            checkpoint = await self._shelf.write(snapshot, self._config.keep)
        except PayloadLost as error:
            self._say("checkpoint_lost", f"checkpoint: that of step {snapshot.step} is left out: {error}")
            return
        self._where.checkpoint_step = snapshot.step
        self.metrics |= {
            "checkpoint/step": float(snapshot.step),
            "checkpoint/write_s": time.monotonic() - began,
            "checkpoint/bytes": float(sum(file.num_bytes for file in checkpoint.files.values())),
        }

    async def flush(self, *, patient: bool = False) -> None:
        """Waits until nothing is being written; raises what went wrong. What waits to be tried again is tried once
        more, at once; with ``patient``, for as long as ``retry_s`` allows."""
        if (writing := self._writing) is None:
            return
        if not patient:
            self._hurry.set()
        try:
            await asyncio.wait([writing])
        finally:
            if not patient:
                self._hurry.clear()
        if self._writing is writing:
            self._writing = None
        if patient and self._ending and writing.exception():
            await asyncio.get_running_loop().create_future()  # what ends the run saves, too, and says how that went
        writing.result()  # each that waited for it gets its failure

    async def _settle(self) -> None:
        """Waits until nothing is being written, whether it succeeds or not."""
        try:
            await self.flush()
        except OpdError as error:
            self._say("checkpoint_failed", f"checkpoint: {error}")

    def _raise_failure(self) -> None:
        if self._writing is not None and self._writing.done():
            done, self._writing = self._writing, None
            done.result()

    async def newest(self, *, healthy: bool = False) -> Snapshot | None:
        """The newest state to go back to, from memory if it is there; None where there is only the beginning."""
        if self._newest is not None and (self._newest.state["healthy"] or not healthy):
            return self._newest
        return await self._on_the_shelf(healthy=healthy)

    async def _on_the_shelf(self, *, healthy: bool = False) -> Snapshot | None:
        # Of one that is being written nobody knows whether it is of use to whoever asks for a healthy one.
        await (self._settle() if healthy else self.flush(patient=True))
        return await self.open(await self._shelf.latest(healthy=healthy))

    async def open(self, checkpoint: Checkpoint | None) -> Snapshot | None:
        """A checkpoint's snapshot, its files in the object store."""
        if checkpoint is None:
            return None
        self._where.checkpoint_step = checkpoint.step
        return await self._shelf.read(checkpoint)

    async def restore(self, snapshot: Snapshot) -> Snapshot | None:
        """Learner and followers go on from ``snapshot``; from the shelf where the one in memory is gone with a node.
        Returns the one that it was, None where nothing is left but the beginning."""
        try:
            await self._hand_out(snapshot)
            return snapshot
        except PayloadLost as error:
            self._say("snapshot_lost", f"lost: the state of step {snapshot.step} in memory ({error})")
            self._newest = None
        written = await self._on_the_shelf()
        if written is not None:
            await self._hand_out(written)
        return written

    async def _hand_out(self, snapshot: Snapshot) -> None:
        await self._rooms.learner.call_all("restore", snapshot.learner_facts, list(snapshot.learner_parts))
        for role, (facts, arrays) in snapshot.followers.items():
            if role in self._rooms.followers:
                await self._rooms.followers[role].call_all("restore", facts, arrays)

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
            await self.write(await self.take(self._where.step))

    async def save_newest(self) -> None:
        """Puts the newest state in memory on the shelf, unless one that is as new is there."""
        await self._settle()
        saved, snapshot = self._where.checkpoint_step, self._newest
        if snapshot is not None and (saved is None or snapshot.step > saved):
            await self.write(snapshot)

    async def close(self, limit_s: float) -> None:
        """Waits for what is being written, whether it succeeds or not, but not for longer than ``limit_s``."""
        try:
            async with asyncio.timeout(limit_s):
                await self._settle()
        except TimeoutError:
            self._writing.cancel()
            self._writing = None
