"""Maps of λ × β: what golden rollouts and the anchor do together, of arms that differ in their coefficients alone.

λ is loss.golden.coef, β loss.reference.coef. Arms may also differ in what follows from those: without golden rollouts
none are mixed in, and every arm has the learning rate that was chosen for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.report.arms import ACCURACY, GREEDY, HIGHEST_TRUNCATION, TRUNCATED, Arm, Cell, Measure
from opd_ray.report.runs import Run

MAPPED = (ACCURACY, GREEDY, TRUNCATED, HIGHEST_TRUNCATION)
"""Shares, of which a cell's shade is made."""
_GOLDEN, _REFERENCE = "loss.golden.coef", "loss.reference.coef"
_FREE = ("name", "seed", _GOLDEN, _REFERENCE, "buffer.golden_per_prompt", "learner.lr")


@dataclass(frozen=True)
class Map:
    """Arms by their two coefficients."""

    student_coef: str
    """What the two stand beside."""
    arms: dict[tuple[float, float], Arm]
    """By (λ, β)."""

    @property
    def lambdas(self) -> list[float]:
        return sorted({golden for golden, _ in self.arms})

    @property
    def betas(self) -> list[float]:
        return sorted({reference for _, reference in self.arms})

    def rows(self, measure: Measure) -> list[tuple[float, list[Cell | None]]]:
        """λ and a cell for each β; None where no arm has both."""
        return [
            (golden, [measure.cell(arm) if (arm := self.arms.get((golden, beta))) else None for beta in self.betas])
            for golden in self.lambdas
        ]


def maps(arms: Sequence[Arm]) -> list[Map]:
    """Of two λ and two β at least, in the order of their first arms."""
    families: dict[tuple[tuple[str, str], ...], dict[tuple[float, float], Arm]] = {}
    for arm in arms:
        places = [(run.config.get(_GOLDEN), run.config.get(_REFERENCE)) for run in arm.runs]
        settings = {_settings(run) for run in arm.runs}
        numbers = all(isinstance(coef, int | float) for coef in places[0])  # and no schedules
        if numbers and len(settings) == 1 and all(place == places[0] for place in places):
            families.setdefault(settings.pop(), {}).setdefault(places[0], arm)
    found = [Map(_student_coef(family), family) for family in families.values()]
    return [each for each in found if len(each.lambdas) > 1 and len(each.betas) > 1]


def _student_coef(family: dict[tuple[float, float], Arm]) -> str:
    coef = next(iter(family.values())).runs[0].config.get("loss.student.coef")
    return f"{coef:g}" if isinstance(coef, int | float) else str(coef)


def _settings(run: Run) -> tuple[tuple[str, str], ...]:
    """What two arms of a map share, whatever their seeds."""
    return tuple(sorted((name, str(value)) for name, value in run.config.items() if name not in _FREE))


def shade(cell: Cell | None) -> str:
    """Of a share: how much of a colour lies behind it, in percent; at most half, so that it can be read."""
    return f"{50 * min(1.0, max(0.0, (cell and cell.value) or 0.0)):.0f}%"
