"""Writes in the background, and of what could not be written yet only the newest."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from opd_ray.errors import DeadlineError, StorageUnavailable
from opd_ray.snapshots.snapshot import Snapshot

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
        self.num_failed = 0
        self._due: Snapshot | None = None
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

    def cancel(self) -> None:
        self._task.cancel()
        self._task = None

    async def _work(self) -> None:
        gives_up_at = None
        try:
            while (snapshot := self._due) is not None:
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
                    gives_up_at = None
                    self._due = None if self._due is snapshot else self._due
        finally:
            self._due = None
            self._free.set()
