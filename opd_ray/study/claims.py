"""What a study was expected to show, and whether its runs show it.

A study file lists ``claims``, each a mapping of one of these kinds over the arms' outcomes by seed:

    {arm: A, above: B, by: x}                      mean sampled accuracy of A is above that of B by x or more
    {arm: A, highest_truncation_below: x}          mean over seeds of A's highest training truncation is below x
    {arm: A, passes_half_truncated_in_most: true}  in most seeds some step of A truncates half of its rollouts
    {arm: A, within: x, of: B, where_collapses: C} wherever C passes half, A ends within x of B, or above
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from opd_ray.errors import InputError
from opd_ray.report.arms import Arm, accuracy_by_seed, highest_truncation, inflated_at


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


def judge(claims: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> list[str]:
    """A sentence for each claim: what was expected, what was found, and whether it holds."""
    found = {arm.label: arm for arm in arms}
    return [_judge(claim, found) for claim in claims]


def _judge(claim: Mapping[str, Any], found: Mapping[str, Arm]) -> str:
    needed = [claim[key] for key in ("arm", "above", "of", "where_collapses") if key in claim]
    if missing := [name for name in needed if name not in found or not accuracy_by_seed(found[name])]:
        return f"not judged, {missing[0]} has not been run: {claim}"
    holds, text = _KINDS[frozenset(claim)](claim, found[claim["arm"]], found)
    return text if holds is None else f"{'holds' if holds else 'does not hold'}: {text}"


_Verdict = tuple[bool | None, str]
"""Whether a claim holds, None where that cannot be said; and what was expected and found."""


def _above(claim: Mapping[str, Any], arm: Arm, found: Mapping[str, Arm]) -> _Verdict:
    ours, theirs = accuracy_by_seed(arm), accuracy_by_seed(found[claim["above"]])
    gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not gains:
        return None, f"not judged, no seed has been run in both arms: {dict(claim)}"
    return fmean(gains) >= claim["by"], (
        f"sampled accuracy of {arm.label} above {claim['above']} by {claim['by']:g}: {fmean(gains):+.3f} in the mean "
        f"[{' '.join(f'{gain:+.2f}' for gain in gains)}]"
    )


def _below(claim: Mapping[str, Any], arm: Arm, _: Mapping[str, Arm]) -> _Verdict:
    highest, limit = fmean(highest_truncation(run) or 0.0 for run in arm.runs), claim["highest_truncation_below"]
    return highest < limit, f"mean of the highest training truncation of {arm.label} below {limit:g}: {highest:.3f}"


def _most(claim: Mapping[str, Any], arm: Arm, _: Mapping[str, Arm]) -> _Verdict:
    passed = len(arm.spread(inflated_at).known)
    text = f"{arm.label} passes half truncated in most seeds: in {passed} of {len(arm.runs)}"
    return (passed > len(arm.runs) / 2) == bool(claim["passes_half_truncated_in_most"]), text


def _within(claim: Mapping[str, Any], arm: Arm, found: Mapping[str, Arm]) -> _Verdict:
    ours, target, collapses = (
        accuracy_by_seed(arm),
        accuracy_by_seed(found[claim["of"]]),
        found[claim["where_collapses"]],
    )
    seeds = [run.seed for run in collapses.runs if inflated_at(run) is not None]
    short = [target[seed] - ours[seed] for seed in seeds if seed in ours and seed in target]
    if not short:
        return None, f"not judged, {collapses.label} passes half truncated in none of the seeds: {dict(claim)}"
    return all(value <= claim["within"] for value in short), (
        f"{arm.label} within {claim['within']:g} of {claim['of']} in the {len(short)} seeds in which {collapses.label} "
        f"passes half truncated, at worst {max(short):+.3f} short"
    )


_KINDS: dict[frozenset[str], Callable[[Mapping[str, Any], Arm, Mapping[str, Arm]], _Verdict]] = {
    frozenset({"arm", "above", "by"}): _above,
    frozenset({"arm", "highest_truncation_below"}): _below,
    frozenset({"arm", "passes_half_truncated_in_most"}): _most,
    frozenset({"arm", "within", "of", "where_collapses"}): _within,
}
