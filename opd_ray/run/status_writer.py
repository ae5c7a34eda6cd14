"""Says where a run stands: status.json every few seconds, and the reason on the console while nothing moves."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_system_memory

from opd_ray.config import Config
from opd_ray.placement.nodes import places_of
from opd_ray.placement.restarts import Restarts
from opd_ray.placement.supervisor import Supervisor
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.memory import resident_bytes
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import UNPLACED, Member, busy_share
from opd_ray.rooms.threads import in_thread
from opd_ray.snapshots import Storage
from opd_ray.snapshots.keeper import Keeper
from opd_ray.status import state
from opd_ray.status.reasons import StallWatch
from opd_ray.status.state import CallStatus, RoomStatus, Status, Whereabouts
from opd_ray.watch.servers import ServerWatch
from opd_ray.weights.delivery import Delivery


class StatusWriter:
    """Puts together what the driver's parts know."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        rooms: Rooms,
        where: Whereabouts,
        supervisor: Supervisor,
        restarts: Restarts,
        delivery: Delivery,
        keeper: Keeper,
        servers: ServerWatch,
        far: Storage | None,
        live: Callable[[dict[str, float]], None],
        say: Callable[..., None],
    ) -> None:
        """``far``: a storage elsewhere, from which others read where the run stands. ``live`` takes the metrics that
        also change while no step is done; ``say(kind, text)`` tells people."""
        self._config, self._rooms, self._where = config, rooms, where
        self._supervisor, self._restarts = supervisor, restarts
        self._delivery, self._keeper, self._servers = delivery, keeper, servers
        self._far, self._live, self._say = far, live, say
        self.num_restores = 0
        """How often the run went back to an earlier state because one was lost."""
        self._stalls = StallWatch()
        self._path = run_dir / state.FILE
        self._writing: asyncio.Future[None] | None = None
        self._sending: asyncio.Future[Any] | None = None
        self._sent_at = -math.inf
        self._placing: asyncio.Future[None] | None = None
        self._told: str | None = None
        self._most_bytes = get_system_memory()
        self._work = {room.room: (0.0, 0.0) for room in self._rooms.every}

    async def run(self) -> None:
        """Until cancelled. What fails here costs the file, not the run, and is said once."""
        while True:
            try:
                self._look()
            except Exception as error:
                self._tell(error)
            await asyncio.sleep(state.WRITE_EVERY_S)

    def _look(self) -> None:
        self._find_places()
        now = self.status()
        if reason := self._stalls.look(time.monotonic(), now):
            print(f"nothing has moved: {reason}", flush=True)
        self._live(self.metrics())
        if self._writing is not None and self._writing.done():
            done, self._writing = self._writing, None
            done.result()
            self._told = None
        if self._writing is None:  # a disk that hangs holds a thread, not the loop
            self._writing = in_thread(state.write, self._path, now)
        if self._far is not None and time.monotonic() - self._sent_at >= state.FAR_EVERY_S:
            self._send(now)

    def _find_places(self) -> None:
        """Asks Ray, beside the loop, where those are that load their models: they cannot say so yet."""
        unknown = [each for room in self._rooms.every for each in room.members if each.whereabouts == UNPLACED]
        if self._placing is not None and self._placing.done():
            self._placing.exception()  # what Ray did not say now it may say at the next look
            self._placing = None
        if unknown and self._placing is None and ray.is_initialized():
            self._placing = in_thread(_place, unknown)

    def _send(self, now: Status) -> None:
        """Where the storage does not answer the keeper says so, whose checkpoints matter more."""
        if self._sending is None or self._sending.done():
            if self._sending is not None:
                self._sending.exception()
            self._sending = in_thread(self._far.write, state.FILE, [state.as_text(now).encode()])
            self._sent_at = time.monotonic()

    def _tell(self, error: Exception, where: object = None) -> None:
        text = f"{where or self._path} stays as it was: {type(error).__name__}: {error}"
        if text != self._told:
            self._told = text
            self._say("status_failed", text)

    async def close(self) -> None:
        """How the run ended, for the file and the metrics port; ``run`` is cancelled."""
        try:
            async with asyncio.timeout(state.STALE_S):
                if self._writing is not None:
                    await asyncio.wait([self._writing])  # its file must not come after this one
                self._live(self.metrics())
                await in_thread(state.write, self._path, last := self.status())
        except Exception as error:
            self._tell(error)
            return
        if self._far is not None:
            try:
                async with asyncio.timeout(state.STALE_S):
                    if self._sending is not None:
                        await asyncio.wait([self._sending])
                    self._send(last)
                    await self._sending
            except Exception as error:
                self._tell(error, self._far.url(state.FILE))

    def status(self) -> Status:
        where, pipeline = self._where, self._keeper.pipeline
        slots, missing, places = pipeline.slots() if pipeline else (None, [], {})
        return Status(
            time=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            phase=where.phase,
            phase_since_s=time.monotonic() - where.since,
            step=where.step,
            steps=self._config.learner.steps,
            version=where.version,
            last_step_s_ago=time.monotonic() - where.last_step_at if where.last_step_at is not None else None,
            slots_taken=len(slots.taken) if slots else 0,
            num_slots=self._config.buffer.num_slots,
            buffered_slots=len(pipeline.buffered()[0]) if pipeline else 0,
            missing_slots=tuple(missing),
            slots_at=places,
            checkpoint_step=where.checkpoint_step,
            rooms=tuple(map(self._room, self._rooms.every)),
            note=where.note,
            below_min_limit_s=self._config.recovery.below_min_s,
        )

    def metrics(self) -> dict[str, float]:
        """The state of the rooms and of what keeps them, under the names that metrics have."""
        by_room = self._restarts.by_room
        values = {"restarts/total": float(sum(by_room.values()))}
        for room in self._rooms.every:
            values[f"pool/{room.room}_ready"] = float(len(room.those("ready")))
            values[f"pool/{room.room}_starting"] = float(len(room.those("starting", "joining")))
            values[f"pool/{room.room}_minimum"] = float(room.size.minimum)
            values[f"restarts/{room.room}"] = float(by_room[room.room])
        pipeline, own = self._keeper.pipeline, resident_bytes()
        return values | {
            "driver/memory_bytes": float(own),
            "driver/memory_share": own / self._most_bytes,
            "recovery/lost_payloads": float(pipeline.num_lost_payloads if pipeline else 0),
            "recovery/restores": float(self.num_restores),
            "recovery/reissued_calls": float(sum(pool.num_reissued for pool in self._rooms.pools)),
            "weights/bytes": float(self._delivery.num_bytes),
            "weights/group_size": float(self._delivery.group_size),
            "weights/rebuilds": float(self._delivery.num_rebuilds),
            "weights/failed_broadcasts": float(self._delivery.num_failed),
            **self._keeper.metrics,
            **self._servers.metrics(),
        }

    def _room(self, room: Pool | Group) -> RoomStatus:
        now, starting = time.monotonic(), room.those("starting", "joining")
        before, self._work[room.room] = self._work[room.room], room.work()
        return RoomStatus(
            room=room.room,
            ready=len(room.members) - len(starting),
            starting=len(starting),
            minimum=room.size.minimum,
            maximum=room.size.maximum,
            waiting=room.num_waiting,
            calls=state.oldest_calls(
                CallStatus(member.name, member.node, method, now - since, member.silent_s(since))
                for member in room.members
                for method, since in member.calls
            ),
            num_calls=room.num_calls,
            restarts=self._restarts.by_room[room.room],
            last_loss=room.last_loss,
            below_min_s=self._supervisor.below_min_s(room.room),
            busy_share=busy_share(self._work[room.room], before) or 0.0,
            spawning=tuple(
                CallStatus(member.name, member.whereabouts, member.state, now - member.since) for member in starting
            ),
            calls_done=room.calls_done,
            deadline_s=room.deadline_s,
            note=self._servers.note(room.room),
        )


def _place(members: Sequence[Member]) -> None:
    for member, place in zip(members, places_of([member.handle for member in members]), strict=True):
        member.placed_on = place
