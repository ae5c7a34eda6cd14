"""The rooms of a run, for whoever works with more than one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool


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

    def stop(self) -> None:
        """Ends every actor."""
        for room in self.every:
            room.stop()
