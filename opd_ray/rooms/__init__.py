"""The rooms of a run, for whoever works with more than one of them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

from opd_ray.errors import ActorError
from opd_ray.messages import MemoryUse
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member, Room

_MEMORY_S = 30.0
"""Within which an idle worker counts its memory."""


@dataclasses.dataclass(frozen=True)
class Rooms:
    """The actors of a run, one pool or group per room."""

    generators: Pool
    learner: Group
    scorers: Mapping[str, Pool | Group]
    """Every teacher by its name, and "reference"; only those that the objective needs."""
    teacher_generators: Pool | None
    """None where the teacher writes no rollouts."""
    recorder: Pool
    """Writes the rollout log, and measures payloads so that they need not pass through the driver."""

    @property
    def all(self) -> dict[str, Pool | Group]:
        """Every room of the loop by its name."""
        teachers = {"teacher_generate": self.teacher_generators} if self.teacher_generators else {}
        return {"generate": self.generators, "learn": self.learner, **self.scorers, **teachers}

    @property
    def every(self) -> list[Pool | Group]:
        """The same and the recorder."""
        return [*self.all.values(), self.recorder]

    @property
    def pools(self) -> list[Pool]:
        """All that grow, shrink and replace their dead."""
        return [room for room in self.every if not room.holds_state]

    @property
    def groups(self) -> list[Group]:
        """All of which a loss ends the attempt."""
        return [room for room in self.every if room.holds_state]

    @property
    def followers(self) -> dict[str, Group]:
        """Scorers that take in the student's weights, by role."""
        return {role: room for role, room in self.scorers.items() if room.holds_state}

    async def memory(self) -> dict[str, MemoryUse]:
        """The most that a process of each room has needed so far. One that gives no answer is left out: whoever calls
        it next learns why."""
        asked = [(room, member) for room in self.every for member in room.those("ready")]
        found: dict[str, MemoryUse] = {}
        for (room, _), use in zip(asked, await asyncio.gather(*(_asked(*each) for each in asked)), strict=True):
            if use is not None:
                found[room.room] = _larger(found.get(room.room, use), use)
        return found

    def stop(self) -> None:
        """Ends every actor."""
        for room in self.every:
            room.stop()


async def _asked(room: Room, member: Member) -> MemoryUse | None:
    try:
        return await room.ask(member, "memory", deadline_s=_MEMORY_S)
    except ActorError:
        return None


def _larger(one: MemoryUse, other: MemoryUse) -> MemoryUse:
    gpus = [use.gpu_bytes for use in (one, other) if use.gpu_bytes is not None]
    return MemoryUse(max(one.host_bytes, other.host_bytes), max(gpus, default=None))
