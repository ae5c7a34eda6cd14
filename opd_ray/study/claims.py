"""What a study was expected to show, and whether its runs show it.

A study file lists ``claims``, each a mapping of one of these kinds over the arms' outcomes by seed:

    {arm: A, above: B, by: x}                      mean sampled accuracy of A is above that of B by x or more
    {arm: A, highest_truncation_below: x}          mean over seeds of A's highest training truncation is below x
    {arm: A, passes_half_truncated_in_most: true}  in most seeds some step of A truncates half of its rollouts
    {arm: A, within: x, of: B, where_collapses: C} wherever C passes half, A ends within x of B, or above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_ray.errors import InputError

if TYPE_CHECKING:
    from opd_ray.study.outcomes import Row

HALF = 0.5

_KINDS: dict[frozenset[str], str] = {
    frozenset({"arm", "above", "by"}): "above",
    frozenset({"arm", "highest_truncation_below"}): "below",
    frozenset({"arm", "passes_half_truncated_in_most"}): "most",
    frozenset({"arm", "within", "of", "where_collapses"}): "within",
}


def check(claims: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> None:
    """Raises InputError for a claim of no known kind, or about an arm that the study does not have."""
    for number, claim in enumerate(claims, start=1):
        if not isinstance(claim, Mapping) or frozenset(claim) not in _KINDS:
            kinds = "; ".join(", ".join(sorted(kind)) for kind in _KINDS)
            raise InputError(f"study: claim {number} has the keys {', '.join(claim)}; expected one of: {kinds}")
        for key in ("by", "highest_truncation_below", "within"):
            if key in claim and not isinstance(claim[key], int | float):
                raise InputError(f"study: claim {number}: {key} is {claim[key]!r}, expected a number")
        for key in ("arm", "above", "of", "where_collapses"):
            if key in claim and claim[key] not in arms:
                raise InputError(f"study: claim {number} is about '{claim[key]}'; the arms are {', '.join(arms)}")


def judge(claims: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """A sentence for each claim: what was expected, what was found, and whether it holds."""
    found = {row.arm: row for row in rows}
    return [_judge(claim, found) for claim in claims]


def _judge(claim: Mapping[str, Any], found: Mapping[str, Row]) -> str:
    needed = [claim[key] for key in ("arm", "above", "of", "where_collapses") if key in claim]
    if missing := [arm for arm in needed if arm not in found]:
        return f"not judged, {missing[0]} has not been run: {claim}"
    row, kind = found[claim["arm"]], _KINDS[frozenset(claim)]
    return {"above": _above, "below": _below, "most": _most, "within": _within}[kind](claim, row, found)


def _above(claim: Mapping[str, Any], row: Row, found: Mapping[str, Row]) -> str:
    other = found[claim["above"]]
    gains = _paired(row, row.sampled, other, other.sampled)
    text = (
        f"sampled accuracy of {row.arm} above {other.arm} by {claim['by']:g}: {np.mean(gains):+.3f} in the mean "
        f"[{' '.join(f'{gain:+.2f}' for gain in gains)}]"
    )
    return _verdict(np.mean(gains) >= claim["by"], text)


def _below(claim: Mapping[str, Any], row: Row, _: Mapping[str, Row]) -> str:
    highest, limit = float(np.mean(row.max_truncation)), claim["highest_truncation_below"]
    text = f"mean of the highest training truncation of {row.arm} below {limit:g}: {highest:.3f}"
    return _verdict(highest < limit, text)


def _most(claim: Mapping[str, Any], row: Row, _: Mapping[str, Row]) -> str:
    passed = sum(value >= HALF for value in row.max_truncation)
    text = f"{row.arm} passes half truncated in most seeds: in {passed} of {len(row.seeds)}"
    return _verdict((passed > len(row.seeds) / 2) == bool(claim["passes_half_truncated_in_most"]), text)


def _within(claim: Mapping[str, Any], row: Row, found: Mapping[str, Row]) -> str:
    target, collapses = found[claim["of"]], found[claim["where_collapses"]]
    seeds = [s for s, value in zip(collapses.seeds, collapses.max_truncation, strict=True) if value >= HALF]
    short = {
        seed: target.sampled[target.seeds.index(seed)] - row.sampled[row.seeds.index(seed)]
        for seed in seeds
        if seed in row.seeds and seed in target.seeds
    }
    if not short:
        return f"not judged, {collapses.arm} passes half truncated in none of the seeds: {dict(claim)}"
    text = (
        f"{row.arm} within {claim['within']:g} of {target.arm} in the {len(short)} seeds in which {collapses.arm} "
        f"passes half truncated, at worst {max(short.values()):+.3f} short"
    )
    return _verdict(all(value <= claim["within"] for value in short.values()), text)


def _paired(row: Row, values: Sequence[float], other: Row, others: Sequence[float]) -> list[float]:
    """Differences on the seeds that both have."""
    there = dict(zip(other.seeds, others, strict=True))
    return [value - there[seed] for seed, value in zip(row.seeds, values, strict=True) if seed in there]


def _verdict(holds: bool, text: str) -> str:
    return f"{'holds' if holds else 'does not hold'}: {text}"
