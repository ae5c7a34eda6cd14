"""What a study was expected to show, and whether its runs show it.

A study file lists ``claims``, each a mapping of one of these kinds over the arms' outcomes by seed:

    {arm: A, above: B, by: x, measure: M}          M of A is above that of B by more than x, seed by seed; M is a
                                                   title of the table, by default sampled accuracy after
    {arm: A, below: x, measure: M}                 M of A is below x
    {arm: A, passes_half_truncated_in_most: true}  in most seeds some step of A truncates half of its rollouts

A claim holds, or it fails, where the two-sided test on the seeds rejects the other at .05 and there are ten seeds at
least; else it is not decided. Every claim is tested by itself: of twenty about nothing, one would be decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_ray.errors import InputError
from opd_ray.report.arms import ACCURACY, MEASURES, Arm, Measure, inflated_at
from opd_ray.report.uncertainty import Location, location, proportion

SEEDS = 10
"""Fewer decide nothing: students differ more than five lucky ones show."""
_MOST = "passes_half_truncated_in_most"
_MEASURES = {measure.title: measure for measure in MEASURES}


@dataclass(frozen=True)
class Judgement:
    """Of one claim."""

    claim: Mapping[str, Any]
    verdict: str
    """holds, fails, not decided, or not judged where runs are missing."""
    expected: str
    found: str
    p: float | None = None
    """Two-sided, of what lies between holding and failing."""
    interval: tuple[float, float] | None = None
    """At 95 %, in the measure's unit; None where seeds are too few for one."""
    seeds: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict}: {self.expected}" + (f": {self.found}" if self.found else "")

    def saved(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "claim": dict(self.claim),
            "verdict": self.verdict,
            "sentence": str(self),
            "p": self.p,
            "interval": self.interval,
            "seeds": list(self.seeds),
        }


def check(claims: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> None:
    """Raises InputError for a claim of no known kind, or about an arm or a measure that there is not."""
    for number, claim in enumerate(claims, start=1):
        if not isinstance(claim, Mapping) or _kind(claim) is None:
            kinds = "; ".join(", ".join(sorted(kind)) for kind in _KINDS)
            keys = ", ".join(claim) if isinstance(claim, Mapping) else claim
            raise InputError(f"study: claim {number} has the keys {keys}; expected one of: {kinds}; and measure")
        for key in ("by", "below"):
            if key in claim and not isinstance(claim[key], int | float):
                raise InputError(f"study: claim {number}: {key} is {claim[key]!r}, expected a number")
        if not isinstance(claim.get(_MOST, True), bool):
            raise InputError(f"study: claim {number}: {_MOST} is {claim[_MOST]!r}, expected true or false")
        for key in ("arm", "above"):
            if key in claim and claim[key] not in arms:
                raise InputError(f"study: claim {number} is about '{claim[key]}'; the arms are {', '.join(arms)}")
        if claim.get("measure", ACCURACY.title) not in _MEASURES:
            raise InputError(
                f"study: claim {number}: measure is '{claim['measure']}'; the measures are {', '.join(_MEASURES)}"
            )


def judge(claims: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> list[Judgement]:
    """Every claim: what was expected, what was found in runs that are finished, and whether it holds."""
    finished = [replace(arm, runs=tuple(run for run in arm.runs if run.finished)) for arm in arms]
    found = {arm.label: arm for arm in finished if arm.runs}
    return [_judge(claim, found) for claim in claims]


def _judge(claim: Mapping[str, Any], found: Mapping[str, Arm]) -> Judgement:
    if missing := [claim[key] for key in ("arm", "above") if key in claim and claim[key] not in found]:
        return Judgement(claim, "not judged", f"{missing[0]} has not been run", str(dict(claim)))
    return _KINDS[_kind(claim)](claim, found[claim["arm"]], found)


def _kind(claim: Mapping[str, Any]) -> frozenset[str] | None:
    kind = frozenset(claim) - {"measure"}
    takes_one = kind in _KINDS and _MOST not in kind
    return kind if kind in _KINDS and (takes_one or "measure" not in claim) else None


def _above(claim: Mapping[str, Any], arm: Arm, found: Mapping[str, Arm]) -> Judgement:
    measure, by, other = _measure(claim), claim["by"], found[claim["above"]]
    differences, error = measure.differences(arm, other)
    margin = f" by more than {by:g}" if by > 0 else f", or less than {-by:g} below" if by < 0 else ""
    expected = f"{arm.quoted} above {other.quoted} in {measure.title}{margin}"
    if not differences:
        return Judgement(claim, "not judged", expected, "no seed has been run in both arms")
    each = list(differences.values())
    ahead = sum(value > by for value in each)
    more = f"so on {ahead} of {len(each)} seeds"
    return _tested(claim, expected, differences, by, error, more, above=True)


def _below(claim: Mapping[str, Any], arm: Arm, _: Mapping[str, Arm]) -> Judgement:
    measure, limit = _measure(claim), claim["below"]
    values, expected = measure.by_seed(arm), f"{arm.quoted} below {limit:g} in {measure.title}"
    if not values:
        return Judgement(claim, "not judged", expected, "no seed has one")
    more = f"so on {sum(value < limit for value in values.values())} of {len(values)} seeds"
    return _tested(claim, expected, values, limit, measure.spread(arm).error, more, above=False)


def _tested(
    claim: Mapping[str, Any],
    expected: str,
    values: Mapping[int, float],
    limit: float,
    error: float | None,
    more: str,
    *,
    above: bool,
) -> Judgement:
    where = location(list(values.values()), limit)
    holds, fails = (where.low > limit, where.high < limit) if above else (where.high < limit, where.low > limit)
    form = "+.3f" if "above" in claim else ".3f"
    mean = f"{where.mean:{form}}" + ("" if error is None else f" ± {error:.3f}")
    return _judgement(claim, expected, f"{mean}, {more}", where, (holds, fails), tuple(values), form)


def _most(claim: Mapping[str, Any], arm: Arm, _: Mapping[str, Arm]) -> Judgement:
    passed = [inflated_at(run) is not None for run in arm.runs]
    where = proportion(sum(passed), len(passed))
    most, few = where.low > 0.5, where.high < 0.5
    wanted = bool(claim[_MOST])
    expected = f"{arm.quoted} passes half truncated in {'most' if wanted else 'few'} seeds"
    decided = (most, few) if wanted else (few, most)
    seeds = tuple(run.seed for run in arm.runs)
    return _judgement(claim, expected, f"in {sum(passed)} of {len(passed)}", where, decided, seeds, ".2f")


def _judgement(
    claim: Mapping[str, Any],
    expected: str,
    found: str,
    where: Location,
    decided: tuple[bool, bool],
    seeds: tuple[int, ...],
    form: str,
) -> Judgement:
    holds, fails = decided
    verdict = ("holds" if holds else "fails" if fails else "not decided") if len(seeds) >= SEEDS else "not decided"
    known = math.isfinite(where.low)
    interval = f"95 % [{where.low:{form}}, {where.high:{form}}], " if known else ""
    few = "" if len(seeds) >= SEEDS else f"; {len(seeds)} seeds, {SEEDS} decide"
    text = f"{found} ({interval}p = {where.p:.2g}{few})"
    return Judgement(claim, verdict, expected, text, where.p, (where.low, where.high) if known else None, seeds)


def _measure(claim: Mapping[str, Any]) -> Measure:
    return _MEASURES[claim.get("measure", ACCURACY.title)]


_KINDS: dict[frozenset[str], Callable[[Mapping[str, Any], Arm, Mapping[str, Arm]], Judgement]] = {
    frozenset({"arm", "above", "by"}): _above,
    frozenset({"arm", "below"}): _below,
    frozenset({"arm", _MOST}): _most,
}
