"""Runs grouped into arms, and what the report says of each in numbers: mean, standard error, every seed.

The standard error is √(variance over seeds / seeds + variance over problems / problems), the second where the answers
to the same problems are kept; there is none for one seed. Nothing here knows HTML.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.report import answers
from opd_ray.report.measurements import SO_FAR
from opd_ray.report.runs import Metrics, Run
from opd_ray.report.uncertainty import error, over_problems

HALF = 0.5
"""An arm has inflated when more than this share of one step's rollouts is truncated."""

TRUNCATION = "rollouts/truncation_rate"
GOOD = 0.6
"""Sampled accuracy by which arms are compared in what it takes to get there."""
MANY = 6
"""More arms than this are rows of a table instead of columns."""

_TITLES = {
    "stableopd": "StableOPD",
    "opd": "Plain OPD",
    "sft": "SFT",
    "grpo": "GRPO",
    "opsa": "OPSA",
    "gkd": "GKD",
    "sequence_kd": "Sequence KD",
    "opd+mixture": "OPD + mixture",
    "opd+reference_kl": "OPD + reference KL",
}


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        return _TITLES.get(self.label, self.label)

    @property
    def quoted(self) -> str:
        """A name with a comma in it would come apart in a sentence."""
        return f"“{self.title}”" if "," in self.title else self.title

    def spread(self, of: Callable[[Run], float | None]) -> Spread:
        return Spread(tuple(map(of, self.runs)))


@dataclass(frozen=True)
class Spread:
    """One number per run; None where a run has none."""

    values: tuple[float | None, ...]
    error_over_problems: float = 0.0

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.known) if self.known else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        over_seeds = error(self.known)
        return None if over_seeds is None else math.hypot(over_seeds, self.error_over_problems)

    def text(self, show: Callable[[float], str]) -> str:
        """ ".74 ± .12", without the standard error for one value, "–" for none."""
        if self.mean is None:
            return "–"
        return show(self.mean) + ("" if self.error is None else f" ± {show(self.error)}")


@dataclass(frozen=True)
class Cell:
    """One measure of one arm, as text: over all seeds, and of each (empty where they are the same)."""

    text: str
    each: tuple[str, ...]
    value: float | None
    """What the table is sorted by."""


@dataclass(frozen=True)
class Measure:
    """What the table of arms says of each."""

    title: str
    of: Callable[[Run], float | None]
    show: Callable[[float], str]
    help: str = ""
    summary: Callable[[Spread], str] | None = None
    """What stands in the cell instead of mean ± standard error."""
    kind: answers.Kind | None = None
    """Of the answers whose mean over problems it is."""

    def spread(self, arm: Arm) -> Spread:
        per_problem = answers.aligned(arm.runs, self.kind) if self.kind else None
        return Spread(arm.spread(self.of).values, 0.0 if per_problem is None else over_problems(per_problem))

    def by_seed(self, arm: Arm) -> dict[int, float]:
        """The value of each seed that has one; the mean of them where a seed ran more than once."""
        values: dict[int, list[float]] = {}
        for run in arm.runs:
            if run.seed is not None and (value := self.of(run)) is not None:
                values.setdefault(run.seed, []).append(value)
        return {seed: statistics.fmean(several) for seed, several in values.items()}

    def differences(self, arm: Arm, other: Arm) -> tuple[dict[int, float], float | None]:
        """Of one arm to another by seed that both ran on, and the standard error of their mean."""
        ours, theirs = self.by_seed(arm), self.by_seed(other)
        found = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
        pairs = [run for each in (arm, other) for run in each.runs if run.seed in found]
        both = answers.aligned(pairs, self.kind) if self.kind and len(pairs) == 2 * len(found) else None
        per_problem = None if both is None else both[: len(found)] - both[len(found) :]
        return found, Spread(tuple(found.values()), 0.0 if per_problem is None else over_problems(per_problem)).error

    def cell(self, arm: Arm) -> Cell:
        spread = self.spread(arm)
        each = tuple("–" if value is None else self.show(value) for value in spread.values)
        text = self.summary(spread) if self.summary else spread.text(self.show)
        return Cell(text, each if len(set(each)) > 1 else (), spread.mean)


def group(runs: Sequence[Run], order: Sequence[str] = ()) -> list[Arm]:
    """Arms in the ``order`` of their labels, then the others: the highest held-out sampled accuracy first and
    those without one last. Runs of an arm by seed. A label in ``order`` that no run has is passed over."""
    by_label: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (-1 if run.seed is None else run.seed, str(run.path))):
        by_label.setdefault(run.arm, []).append(run)
    arms = [Arm(label, tuple(members)) for label, members in sorted(by_label.items())]
    places = {label: place for place, label in reversed([*enumerate(order)])}
    return sorted(most_accurate(arms), key=lambda arm: places.get(arm.label, len(places)))


def most_accurate(arms: Sequence[Arm]) -> list[Arm]:
    """The arms by held-out sampled accuracy after training, the highest first and those without one last."""
    means = {arm.label: final_accuracy(arm).mean for arm in arms}
    return sorted(arms, key=lambda arm: math.inf if means[arm.label] is None else -means[arm.label])


def evaluated(when: str, name: str) -> Callable[[Run], float | None]:
    """Reads one number of the evaluation "before" or "after" training."""
    return lambda run: run.evaluation(when).get(name)


def final_accuracy(arm: Arm) -> Spread:
    """Held-out sampled accuracy after training."""
    return ACCURACY.spread(arm)


def highest_truncation(run: Run) -> float | None:
    """Of any step's rollouts, abandoned ones included; from the measurements, which an unfinished run has too."""
    return max((rate for metrics in run.attempts for rate in metrics.get(TRUNCATION, {}).values()), default=None)


def inflated_at(run: Run) -> int | None:
    """The step at which, for the first time, more than half of the rollouts were truncated."""
    return (crossing(run) or (None, None))[1]


def crossing(run: Run) -> tuple[Metrics, int] | None:
    """The attempt in which a run first passed half truncated, and the step; None if it never did."""
    steps = (
        (metrics, step) for metrics in run.attempts for step, rate in metrics.get(TRUNCATION, {}).items() if rate > HALF
    )
    return next(steps, None)


def recovered(run: Run) -> bool:
    """Inflated on the way, but truncating half or less in the end (held out, else over the last steps)."""
    if inflated_at(run) is None:
        return False
    last = evaluated("after", "truncation_rate")(run)
    return (tail_mean(run, TRUNCATION) if last is None else last) <= HALF


def tail_mean(run: Run, metric: str, steps: int = 10) -> float | None:
    """Mean of a metric over its last ``steps`` measurements; None if it has none."""
    values = list(run.metrics.get(metric, {}).values())[-steps:]
    return statistics.fmean(values) if values else None


def head_mean(run: Run, metric: str, steps: int = 20) -> float | None:
    """Mean of a metric over the run's first ``steps`` steps; None if it has none of them."""
    values = [value for step, value in run.metrics.get(metric, {}).items() if step <= steps]
    return statistics.fmean(values) if values else None


def endorsed(run: Run) -> float | None:
    """The teacher's mean log-prob (nats) of repetitive tokens, over the steps that truncated more than half of their
    rollouts; None where none did. Near 0 it endorses the loops; far below, they have another cause."""
    truncated = run.metrics.get(TRUNCATION, {})
    logprobs = run.metrics.get("learner/teacher_logprob_repetitive", {})
    values = [value for step, value in logprobs.items() if truncated.get(step, 0.0) > HALF]
    return statistics.fmean(values) if values else None


def markdown(arms: Sequence[Arm], titles: Sequence[str]) -> str:
    """A table of some of the MEASURES: number of seeds, mean ± standard error, and each seed's value."""
    chosen = [measure for measure in MEASURES if measure.title in titles]
    lines = [
        "| " + " | ".join(("arm", "seeds", *(measure.title for measure in chosen))) + " |",
        "|" + "---|" * (len(chosen) + 2),
    ]
    for arm in arms:
        cells = [measure.cell(arm) for measure in chosen]
        each = [cell.text + (f" [{' '.join(cell.each)}]" if cell.each else "") for cell in cells]
        lines.append("| " + " | ".join((arm.title, str(len(arm.runs)), *each)) + " |")
    return "\n".join(lines)


def results(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """All MEASURES of every arm as plain values: one for each seed, and the standard errors of their means."""
    spreads = [(arm, {measure.title: measure.spread(arm) for measure in MEASURES}) for arm in arms]
    return [
        {"arm": arm.label, "seeds": [run.seed for run in arm.runs]}
        | {title: list(spread.values) for title, spread in each.items()}
        | {"standard errors": {title: spread.error for title, spread in each.items()}}
        for arm, each in spreads
    ]


def share(value: float) -> str:
    """ ".93", and "1.00" for one: a share of 1, two digits."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def count(value: float) -> str:
    """ "950", "42.1 k", "3.4 M"."""
    for size, least, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def clock(seconds: float) -> str:
    """ "41 s", "3:05", "2:03:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def steps_between(steps: Sequence[float]) -> str:
    """ "34", or "34–61"."""
    low, high = int(min(steps)), int(max(steps))
    return f"{low}" if low == high else f"{low}–{high}"


def _crossings(spread: Spread) -> str:
    if not spread.known:
        return "never"
    often = f"{len(spread.known)} of {len(spread.values)}: " if len(spread.values) > 1 else ""
    return f"{often}{steps_between(spread.known)}"


def _summarised(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.summary.get(name)


def _num_events(run: Run) -> float | None:
    counts = run.summary.get("guard_event_counts")
    return (sum(counts.values()) if counts else len(run.events)) if run.finished else None


def _best(at: int) -> Callable[[Run], float | None]:
    return lambda run: (answers.best_step(run) or (None, None))[at]


def _steps(spread: Spread) -> str:
    return steps_between(spread.known) if spread.known else "–"


def _until_good(what: str) -> Callable[[Run], float | None]:
    """The sum of a metric up to the first evaluation on the way that is GOOD; None without one."""

    def of(run: Run) -> float | None:
        accuracies, sums = run.metrics.get("evaluation/accuracy_sampled", {}), run.metrics.get(what + SO_FAR, {})
        first = next((step for step, accuracy in accuracies.items() if accuracy >= GOOD), None)
        return next((value for step, value in sums.items() if first is not None and step >= first), None)

    return of


def _reached(show: Callable[[float], str]) -> Callable[[Spread], str]:
    """The mean over runs that have a value, with how many have."""

    def text(spread: Spread) -> str:
        few = len(spread.known) < len(spread.values) and bool(spread.known)
        return (f"{len(spread.known)} of {len(spread.values)}: " if few else "") + spread.text(show)

    return text


_WHOLE = "{:.0f}".format
_NATS = "{:.2f}".format
ACCURACY = Measure(
    "sampled accuracy after", evaluated("after", "accuracy_sampled"), share, "held out, at temperature", None, "sampled"
)
GREEDY = Measure(
    "greedy accuracy after", evaluated("after", "accuracy_greedy"), share, "held out, temperature 0", None, "greedy"
)
TRUNCATED = Measure(
    "truncated after",
    evaluated("after", "truncation_rate"),
    share,
    "held-out sampled answers without EOS",
    None,
    "truncated",
)
HIGHEST_TRUNCATION = Measure(
    "highest truncation in training", highest_truncation, share, "largest share of one step's rollouts"
)
MEASURES = (
    Measure("sampled accuracy before", evaluated("before", "accuracy_sampled"), share, "held out, at temperature"),
    ACCURACY,
    Measure("greedy accuracy before", evaluated("before", "accuracy_greedy"), share, "held out, temperature 0"),
    GREEDY,
    Measure("best step", _best(0), _WHOLE, "of the evaluations, by sampled accuracy on the same problems", _steps),
    Measure("best step above last", _best(1), share, "sampled accuracy; the best of several is flattered by chance"),
    TRUNCATED,
    Measure("mean length after", evaluated("after", "mean_length"), "{:.1f}".format, "tokens, held out"),
    HIGHEST_TRUNCATION,
    Measure("truncation passes ½ at step", inflated_at, _WHOLE, "first step over half", _crossings),
    Measure("teacher's log-prob of repeats", endorsed, _NATS, "nats, in steps over half truncated"),
    Measure(
        "teacher's P(stop) at ends",
        lambda run: head_mean(run, "learner/eos_teacher_end"),
        share,
        "first 20 steps; 0 where it ends with another token",
    ),
    Measure(
        "off-policy KL",
        lambda run: head_mean(run, "learner/off_policy_kl"),
        _NATS,
        "nats a token, first 20 steps: how far rollouts are behind",
    ),
    Measure("trained tokens", _summarised("trained_tokens"), count, "response tokens, golden ones included"),
    Measure("generated tokens", _summarised("rollout_tokens"), count, "of the student's rollouts that were trained on"),
    Measure(
        "generated tokens to .6",
        _until_good("rollouts/tokens"),
        count,
        "up to the first evaluation on the way with a sampled accuracy of .6",
        _reached(count),
    ),
    Measure("time to .6", _until_good("throughput/step_s"), clock, "the same, in training steps", _reached(clock)),
    Measure("wall time", _summarised("wall_s"), clock, "of the training steps and evaluations"),
    Measure("guard events", _num_events, _WHOLE, "warnings included"),
)
