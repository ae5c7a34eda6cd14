"""Who may write to a checkpoint directory: one run, and one driver of it at a time.

    lease.json   whose it is (run, driver, host, process), a beat that the driver counts up, and whether it is released

Clocks of two machines differ, so nobody compares them: whoever wants the directory watches the file for ``STALE_S`` of
its own clock, and takes it over when it did not change. A driver on the same machine whose process is gone, and one
that has released the lease, is not waited for. A storage need not create files atomically: a driver that takes the
lease writes its name, waits until what others have under way is written, and reads back whose name is there. The
holder reads it again before all that it writes or deletes, so one that was superseded stops, whoever won.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_ray.errors import OpdError, RunError, StorageUnavailable, Superseded, refusing
from opd_ray.rooms.threads import in_thread, within
from opd_ray.snapshots.storage import Storage
from opd_ray.status.reasons import process_alive

FILE = "lease.json"
BEAT_S = 10.0
"""How often the holder counts up."""
STALE_S = 60.0
"""A lease that did not change for so long is nobody's: several beats, so that a slow storage costs nobody the lease."""
_LOOK_S = 2.0
_RELEASE_S = 10.0
"""How long a driver that ends waits for a storage that does not answer; then its lease becomes stale."""
_FORMAT = "opd_ray lease"


class Lease:
    """The right to write to ``storage``, for the run of that name and this object."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is read or written yet."""
        self._storage, self._clock, self._pause = storage, clock, pause
        self._mine: dict[str, Any] = {
            "format": _FORMAT,
            "run": run,
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "beat": 0,
        }
        self._held = False
        self._turn = threading.Lock()
        """A beat that hangs must not undo the release."""

    def check_run(self, *, empty: bool) -> None:
        """Raises RunError where another run has its checkpoints, or is about to; ``empty`` says that none are there."""
        there = self._read()
        run = there.get("run", self._mine["run"])
        if run != self._mine["run"] and not (empty and there["released"]):
            raise RunError(
                f"{self._storage.url()} is of another run, {run} ({_who(there)}), and this one is {self._mine['run']}; "
                "give another checkpoint.directory ({run} in it stands for the name of the run directory) or, if it "
                f"is the same run under another name, delete {self._storage.url(FILE)}"
            )

    def take(self) -> None:
        """Blocks until the lease is ours. Raises InputError when another driver holds it."""
        with refusing("checkpoints"):
            self._wait_until_free()
            self._write(released=False)
            self._pause(0.2 if self._storage.is_local else 2.0)
            there = self._read()
            if there.get("owner") != self._mine["owner"]:
                raise RunError(
                    f"{self._storage.url()} was taken at the same moment by {_who(there)}; start one of the two"
                )
            self._held = True

    def confirm(self) -> None:
        """Before anything is written or deleted. Raises Superseded when the lease is another's.

        The bug: of two drivers with one directory each deleted, as left over, what the other was writing, and neither
        noticed.
        """
        if not (there := self._read()):
            raise StorageUnavailable(f"{self._storage.url(FILE)} is only half written; it is read again")
        # Whoever has deleted the file has not taken it: the next beat writes it anew.
        if there.get("owner", self._mine["owner"]) != self._mine["owner"]:
            raise Superseded(
                f"{self._storage.url()} was taken over by {_who(there)} of {there['run']}, because this driver gave no "
                f"sign for more than {STALE_S:g} s; this one ends and leaves everything there to the other"
            )

    def beat(self) -> None:
        """Shows that the holder lives. Raises Superseded when it is the holder no more."""
        with self._turn:
            if self._held:
                self.confirm()
                self._mine["beat"] += 1
                self._write(released=False)

    async def keep(self) -> None:
        """Beats until cancelled, in threads: a storage that hangs does not stop the loop, and one that is away for a
        while does not end the run. Raises Superseded."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await in_thread(self.beat)
            except Superseded:
                raise
            except RunError:
                pass  # whoever writes a checkpoint meets the same failure, and says it

    def release(self) -> None:
        """Lets the next driver begin at once. Never raises."""
        if self._held:
            with contextlib.suppress(OpdError, TimeoutError):
                within(_RELEASE_S, self._release)

    def _release(self) -> None:
        with self._turn:
            self._held = False
            self.confirm()
            self._write(released=True)

    def _wait_until_free(self) -> None:
        seen = self._read()
        if seen.get("released"):
            return
        if seen.get("machine") == self._mine["machine"] and seen["pid"] != os.getpid():
            if process_alive(seen["pid"], seen["time"]):
                raise self._in_use(seen)
            return
        print(
            f"checkpoints: {self._storage.url()} was not released by {_who(seen)}; watching for {STALE_S:g} s whether "
            "it is still at work",
            flush=True,
        )
        until = self._clock() + STALE_S
        while self._clock() < until:
            self._pause(_LOOK_S)
            if (there := self._read()) != seen:
                if there.get("released"):
                    return
                raise self._in_use(there)

    def _in_use(self, there: dict[str, Any]) -> RunError:
        return RunError(f"{self._storage.url()} is being written by {_who(there)}; wait for it, or end it first")

    def _read(self) -> dict[str, Any]:
        """What the file says; nothing where it is half written. RunError for another's file of that name."""
        content = self._storage.read_if_there(FILE)
        if content is None:
            return {"released": True}
        try:
            there = json.loads(content)
        except ValueError:
            return {}
        if not isinstance(there, dict) or there.get("format") != _FORMAT:
            raise RunError(f"{FILE} is not one of opd_ray; give a directory of its own with checkpoint.directory")
        return there

    def _write(self, *, released: bool) -> None:
        document = self._mine | {"time": time.time(), "released": released}
        self._storage.write(FILE, [json.dumps(document).encode()])


def _who(there: dict[str, Any]) -> str:
    return f"process {there['pid']} on {there['host']}" if "pid" in there else "an unknown driver"


def _machine() -> str:
    """Where process ids mean the same: two containers of one host have the same numbers for different processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
