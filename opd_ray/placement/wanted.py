"""Which rooms several runs need between them, and which of the runs says what each is started with.

Runs one after another share their rooms. A room is started for the first run that needs it, a scorer for the first
whose scorer follows the student, if any does: one that takes broadcasts in serves a run with a fixed model as well, not
the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_ray.config import ROOMS, Config, differences

_COMMON = frozenset({"rollout", "learner", "weights", "deadlines", "student", "env"})
"""Sections that rooms of every run are started with."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The union of what some runs need."""

    first: Config
    """Of generators, learner and recorder, which every run has."""
    scorers: Mapping[str, Config]
    """By role, whose configuration of it the room has."""
    writer: Config | None
    """Of the generators on the teacher; None where it writes nothing for any run."""

    @classmethod
    def of(cls, configs: Sequence[Config]) -> Wanted:
        """At least one."""
        scorers: dict[str, Config] = {}
        for config in configs:
            for role, scorer in config.scorers.items():
                if role not in scorers or (scorer.follows_student and not _follows(scorers[role], role)):
                    scorers[role] = config
        return cls(configs[0], scorers, next((each for each in configs if each.buffer.has_teacher_write), None))

    def whose(self, field: str) -> Config:
        """The run that decided with which value of a field (``section.name``) the rooms are started."""
        section = _section(field)
        wrote = self.writer if section == "teacher" else None
        return self.scorers.get(section) or wrote or self.first

    def unlike(self, config: Config) -> Iterator[tuple[str, Any, Any]]:
        """The fields, with both values, that keep a run out of the rooms."""
        writes = config.buffer.has_teacher_write
        if writes and self.writer and self.writer.teacher.path != config.teacher.path:
            yield "teacher.path", self.writer.teacher.path, config.teacher.path
        sections = {*_COMMON, *config.scorers, *["teacher"] * writes}
        for whose in {id(each): each for each in map(self.whose, sorted(sections))}.values():
            for name, theirs, ours in differences(whose, config, ROOMS):
                if _section(name) in sections and self.whose(name) is whose:
                    yield name, theirs, ours
        for role, scorer in config.scorers.items():
            there = self.scorers[role].scorers[role] if role in self.scorers else None
            if there and scorer.follows_student and not there.follows_student:
                yield f"{role}.update", there.update, scorer.update


def _section(field: str) -> str:
    """The section of a field, the name of a further teacher, or the role of a scorer."""
    return field.removeprefix("more_teachers.").partition(".")[0]


def _follows(config: Config, role: str) -> bool:
    return config.scorers[role].follows_student
