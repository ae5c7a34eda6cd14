"""Where the teacher can be trusted, of arms in which evidence decides it: what summary.json says of their prompts.

Counts of an arm's runs are added up. Fifths are those of the shares of right responses, so far as verdicts told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.report.arms import Arm, share

CHOICES = {"teacher": "teacher", "golden": "golden solution", "reward": "reward", "nothing": "nothing"}
_FIFTHS = ("0 – .2", ".2 – .4", ".4 – .6", ".6 – .8", ".8 – 1")


@dataclass(frozen=True)
class Place:
    """Prompts of one kind."""

    counts: Mapping[str, int]
    """By what they are taught by."""

    @property
    def prompts(self) -> int:
        return sum(self.counts.values())

    @property
    def value(self) -> float:
        """Share that the teacher teaches, for the shade."""
        return self.counts.get("teacher", 0) / max(1, self.prompts)

    def share(self, choice: str) -> str:
        return share(self.counts.get(choice, 0) / max(1, self.prompts))


@dataclass(frozen=True)
class Length:
    """Prompts of about the same length."""

    tokens: str
    teacher: float | None
    """Shares of right responses; None without verdicts."""
    student: float | None
    place: Place


@dataclass(frozen=True)
class Trust:
    """One arm."""

    arm: Arm
    shares: Mapping[tuple[int | None, int | None], Place]
    """By the fifths of the teacher and of the student, 0 to 4; None without verdicts."""
    lengths: Sequence[Length]

    @property
    def all(self) -> Place:
        return Place(sum((Counter(place.counts) for place in self.shares.values()), Counter()))

    @property
    def students(self) -> list[str]:
        """The columns."""
        return [_name(fifth) for fifth in self._fifths(1)]

    def rows(self) -> list[tuple[str, list[Place | None]]]:
        """The teacher's fifth, the best first, and a place for each of the student's."""
        columns = self._fifths(1)
        return [(_name(row), [self.shares.get((row, each)) for each in columns]) for row in reversed(self._fifths(0))]

    def _fifths(self, whose: int) -> list[int | None]:
        """Those that occur; without verdicts, if any, comes first."""
        there = {place[whose] for place in self.shares}
        return ([None] if None in there else []) + sorted(each for each in there if each is not None)


def trusts(arms: Sequence[Arm]) -> list[Trust]:
    """Of the arms that have seen evidence."""
    found = []
    for arm in arms:
        if seen := [run.summary["evidence"] for run in arm.runs if run.summary.get("evidence")]:
            shares: dict[tuple[int | None, int | None], Counter[str]] = {}
            for teacher, student, counts in (row for each in seen for row in each["shares"]):
                shares.setdefault((teacher, student), Counter()).update(counts)
            places = {place: Place(counts) for place, counts in shares.items()}
            if places:
                found.append(Trust(arm, places, _lengths([row for each in seen for row in each["lengths"]])))
    return found


def _lengths(rows: Sequence[Sequence[Any]]) -> list[Length]:
    """Classes that are the same in several runs are one."""
    sums: dict[tuple[int, int], tuple[list[float], Counter[str]]] = {}
    for fewest, most, *numbers, counts in rows:
        before, counted = sums.setdefault((fewest, most), ([0.0] * 4, Counter()))
        before[:] = [old + new for old, new in zip(before, numbers, strict=True)]
        counted.update(counts)
    return [
        Length(
            f"{fewest}" if fewest == most else f"{fewest} – {most}",
            right / judged if judged else None,
            own_right / own_judged if own_judged else None,
            Place(counts),
        )
        for (fewest, most), ((right, judged, own_right, own_judged), counts) in sorted(sums.items())
    ]


def _name(fifth: int | None) -> str:
    return "no verdict" if fifth is None else _FIFTHS[fifth]
