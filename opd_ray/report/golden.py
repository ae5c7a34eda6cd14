"""Accuracy against the number of golden rollouts: arms that differ in nothing but their golden set.

Arms belong together if, on the seeds that they share, their resolved configurations agree in all but name and
golden file. Arms that train on raw rollouts of the teacher are left out: those are not golden.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_ray.report.arms import Arm, Spread, evaluated
from opd_ray.report.runs import Run

_ITS_OWN = ("name", "seed", "data.golden")
_TEACHER_ROLLOUTS = "teacher-rollouts"
"""How a study's file of the teacher's own rollouts begins."""


@dataclass(frozen=True)
class Kind:
    """One line of the chart."""

    label: str
    arms: tuple[Arm, ...]
    """In the order of the study; their sets are of two sizes at least."""

    @property
    def points(self) -> list[tuple[int, float]]:
        """Golden rollouts used, and sampled accuracy after, of each run that has been evaluated."""
        runs = [run for arm in self.arms for run in arm.runs]
        return [(run.golden_used, value) for run in runs if (value := _accuracy(run)) is not None and run.golden_used]

    def at(self, size: int) -> Spread:
        """Accuracies of the runs with a set of this size."""
        return Spread(tuple(accuracy for used, accuracy in self.points if used == size))


def kinds(arms: Sequence[Arm]) -> list[Kind]:
    """In the order of their first arms; empty if no two arms differ in the size of their golden set only."""
    families: list[list[Arm]] = []
    for arm in filter(_has_golden, arms):
        family = next((family for family in families if _agree(family[0], arm)), [])
        if not family:
            families.append(family)
        family.append(arm)
    found = [Kind(_label(family), tuple(family)) for family in families]
    return [kind for kind in found if len({size for size, _ in kind.points}) > 1]


def _has_golden(arm: Arm) -> bool:
    sets = [(run.golden_used, Path(str(run.config.get("data.golden"))).name) for run in arm.runs if run.finished]
    return bool(sets) and all(size and not name.startswith(_TEACHER_ROLLOUTS) for size, name in sets)


_accuracy = evaluated("after", "accuracy_sampled")


def _agree(one: Arm, other: Arm) -> bool:
    own, its = ({run.seed: _settings(run) for run in arm.runs} for arm in (one, other))
    shared = own.keys() & its.keys()
    return bool(shared) and all(own[seed] == its[seed] for seed in shared)


def _settings(run: Run) -> dict[str, object]:
    return {name: value for name, value in run.config.items() if name not in _ITS_OWN}


def _label(family: Sequence[Arm]) -> str:
    """What the arms' names begin with, without the size; the first arm's name if that is nothing."""
    common = os.path.commonprefix([arm.title for arm in family])
    return common.rstrip(" ,;:–-(_0123456789") or family[0].title
