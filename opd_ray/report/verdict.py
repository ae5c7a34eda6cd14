"""What the numbers come to, in sentences. Every claim is counted from the runs; none is made without seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.report.arms import (
    ACCURACY,
    MANY,
    Arm,
    evaluated,
    final_accuracy,
    highest_truncation,
    inflated_at,
    most_accurate,
    recovered,
    share,
    steps_between,
    tail_mean,
)
from opd_ray.report.runs import Run

_NOTICEABLE = 0.02
"""Accuracies closer than this are called the same: about one standard error on 500 problems."""


@dataclass(frozen=True)
class Verdict:
    headline: str
    about: str | None
    """Label of the one arm that the headline is about, if it is about one."""
    others: tuple[tuple[str, str], ...]
    """Label and sentence of each arm that the headline says no more of."""
    caveats: tuple[str, ...]


def judge(arms: Sequence[Arm]) -> Verdict:
    """Sentences about the arms, in their order."""
    leader = most_accurate(arms)[0]
    alone = len(arms) <= MANY
    others = [arm for arm in arms if not (alone and arm is leader)]
    return Verdict(
        _about(leader, leader) if alone else _overview(arms),
        leader.label if alone else None,
        tuple((arm.label, _about(arm, leader)) for arm in others),
        tuple(_caveats(arms)),
    )


def _about(arm: Arm, leader: Arm) -> str:
    against = _seeds(arm) if arm is leader else _comparison(arm, leader)
    return f"{arm.title} {_course(arm)}{against}; {_inflation(arm)}{_guard(arm)}."


def _overview(arms: Sequence[Arm]) -> str:
    """Who ended highest, who level with it, and which arms inflated how often."""
    ranked = [arm for arm in most_accurate(arms) if final_accuracy(arm).known]
    if not ranked:
        return f"No arm has a final evaluation yet; {_who_inflated(arms)}."
    first, *rest = ranked
    mean = final_accuracy(first).mean
    level = [arm for arm in rest if mean - final_accuracy(arm).mean < _NOTICEABLE]
    level_with = f", level with {_listed([arm.quoted for arm in level])}" if level else ""
    if not level and rest:
        level_with = f", before {rest[0].quoted} at {share(final_accuracy(rest[0]).mean)}"
    reached = f"{final_accuracy(first).text(share)} held-out sampled accuracy{_seeds(first)}"
    return f"{first.quoted} ended highest, at {reached}{level_with}; {_who_inflated(arms)}."


def _who_inflated(arms: Sequence[Arm]) -> str:
    counts = [(len(arm.spread(inflated_at).known), arm) for arm in arms]
    inflated = sorted(filter(lambda pair: pair[0], counts), key=lambda pair: -pair[0])
    if not inflated:
        return "no arm truncated more than half of a step's rollouts"
    if all(len(arm.runs) == 1 for arm in arms):
        return f"{_listed([arm.quoted for _, arm in inflated])} inflated, past half truncated"
    parts = [f"{arm.quoted} in {count} of {len(arm.runs)} seeds" for count, arm in inflated]
    return f"{_listed(parts)} inflated, past half truncated"


def _listed(parts: Sequence[str], most: int = 3) -> str:
    """ "a", "a and b", "a, b and 3 others"."""
    if len(parts) > most + 1:
        parts = [*parts[:most], f"{len(parts) - most} others"]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _course(arm: Arm) -> str:
    """How the accuracy went: "rose from .31 to .74 ± .12 held-out sampled accuracy"."""
    before, after = arm.spread(evaluated("before", "accuracy_sampled")), final_accuracy(arm)
    if after.mean is None:
        tails = arm.spread(lambda run: tail_mean(run, "rollouts/accuracy"))
        seen = f", training accuracy {tails.text(share)} over the last steps" if tails.known else ""
        return f"has no final evaluation{seen}"
    to = f"{after.text(share)} held-out sampled accuracy"
    if before.mean is None:
        return f"ended at {to}"
    if abs(after.mean - before.mean) < _NOTICEABLE:
        return f"stayed at {to} (from {share(before.mean)})"
    return f"{'rose' if after.mean > before.mean else 'fell'} from {share(before.mean)} to {to}"


def _seeds(arm: Arm) -> str:
    if len(arm.runs) > 1:
        done = len(final_accuracy(arm).known)
        return f" ({done or len(arm.runs)}{f' of {len(arm.runs)}' if 0 < done < len(arm.runs) else ''} seeds)"
    return f" (seed {arm.runs[0].seed})" if arm.runs[0].seed is not None else " (one run)"


def _comparison(arm: Arm, leader: Arm) -> str:
    """Against the leader on the seeds they share, which pairs away what a lucky student brings."""
    by_seed, error = ACCURACY.differences(leader, arm)
    differences = list(by_seed.values())
    if not differences:
        return _seeds(arm)
    mean, where = statistics.fmean(differences), f"on the same seed{'s' if len(differences) > 1 else ''}"
    if abs(mean) < _NOTICEABLE:
        return f", no different from {leader.title} {where}"
    if len(differences) == 1:
        return f", {share(mean)} behind {leader.title} {where}"
    often = f"{sum(difference > 0 for difference in differences)} of {len(differences)} seeds"
    clear = "" if mean > 2 * error else ", within two standard errors"
    return f", {share(mean)} behind {leader.title} ({often}{clear})"


def _inflation(arm: Arm) -> str:
    crossings = arm.spread(inflated_at).known
    if not crossings:
        rates = arm.spread(highest_truncation).known
        return (
            f"it never truncated more than {share(max(rates))} of a step's rollouts" if rates else "it sampled nothing"
        )
    where = f" in {len(crossings)} of {len(arm.runs)} seeds" if len(arm.runs) > 1 else ""
    since = f"more than half truncated from step {steps_between(crossings)}"
    back = sum(map(recovered, arm.runs))
    if not back:
        return f"it inflated{where} ({since})"
    who = "it" if len(arm.runs) == 1 else f"{back} of them"
    return f"it inflated{where} ({since}; {who} came back under half by the end)"


def _guard(arm: Arm) -> str:
    """Warnings are in the table of events; here is only what changed the run."""
    acts = [[event for event in run.events if event.get("level") != "warn"] for run in arm.runs]
    acted = [events for events in acts if events]
    if not acted:
        return ""
    if len(arm.runs) > 1:
        return f"; the guard acted in {len(acted)} of {len(arm.runs)} runs"
    (events,) = acted
    times = "once," if len(events) == 1 else f"{len(events)} times, first"
    return f"; the guard acted {times} at step {events[0]['step']}"


def _caveats(arms: Sequence[Arm]) -> list[str]:
    said, runs = [], [run for arm in arms for run in arm.runs]
    if unfinished := [run for run in runs if not run.finished]:
        said.append(f"Unfinished: {', '.join(map(_progress, unfinished))}.")
    if back := [run for run in runs if run.abandoned]:
        said.append(f"Went back and on from there: {'; '.join(map(_returns, back))}.")
    if len(runs) == len(arms):
        said.append("One seed an arm: no spread is known, and another seed may come out differently.")
    for run in (each for each in runs if each.damaged_lines):
        said.append(f"Lines of {run.path.name}/metrics.jsonl that are damaged and left out: {run.damaged_lines}.")
    for arm in arms:
        if mixed := _mixed(arm):
            said.append(f"Runs of {arm.title} differ in more than their seed: {', '.join(mixed)}.")
    if problems := {int(number) for run in runs if (number := run.evaluation("after").get("num_problems"))}:
        said.append(f"Held-out accuracies are on {' and '.join(f'{n:,}' for n in sorted(problems))} problems a run.")
    return said


def _mixed(arm: Arm) -> list[str]:
    """Settings that differ within an arm, other than the models and data that belong to a seed."""
    return [
        name
        for name in sorted({name for run in arm.runs for name in run.config} - {"seed", "name"})
        if not name.startswith("data.")
        and not name.endswith("path")
        and len({repr(run.config.get(name)) for run in arm.runs}) > 1
    ]


def _returns(run: Run) -> str:
    """The steps at which a run turned back; maxima over a run count what it abandoned, its curves do not."""
    who = run.arm if run.seed is None else f"{run.arm}, seed {run.seed}"
    turns = [
        f"{'rolled back' if attempt.rolled_back else 'cut off'} at step {attempt.last}, to {attempt.first - 1}"
        for attempt in run.abandoned
    ]
    return f"{who} ({', '.join(turns)})"


def _progress(run: Run) -> str:
    planned = f" of {run.planned_steps}" if run.planned_steps else ""
    return f"{run.path.name} (step {run.steps}{planned})"
