"""Which measurements become which chart, and the charts as data for the page's script.

Charts say of a metric what :mod:`opd_ray.watch.catalogue` says. One that no chart names still gets one, in the last
group: what a run measured is never hidden.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_ray.report.runs import Run
from opd_ray.watch.catalogue import metric


@dataclass(frozen=True)
class ReferenceLine:
    """A level to compare a curve with, such as the teacher's own truncation."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One panel: up to four metrics, told apart by their dashes, and the evaluation's points on top."""

    title: str
    """Empty: a chart for each metric there is, titled after it."""
    metrics: Mapping[str, str]
    """Metric's name, or a pattern of such, and what to call it beside the others; empty: after its name."""
    evaluation: str = ""
    """Metric of held-out evaluations to draw as points."""
    help: str = field(default="", kw_only=True)
    """Empty: what the first metric means."""


_IDLE = "Idle"
_REST = "Everything else that was measured"
_GROUPS: dict[str, tuple[Chart, ...]] = {
    "What the student writes": (
        Chart("Accuracy", {"rollouts/accuracy": ""}, "evaluation/accuracy_sampled"),
        Chart("Truncation", {"rollouts/truncation_rate": ""}, "evaluation/truncation_rate"),
        Chart("Length", {"rollouts/length": ""}, "evaluation/mean_length"),
        Chart("Repetition", {"rollouts/repetition_rate": ""}, "evaluation/repetition_rate"),
        Chart("Tokens in truncated rollouts", {"rollouts/truncated_token_share": ""}),
        Chart("Greedy accuracy", {"evaluation/accuracy_greedy": ""}),
    ),
    "Held-out sets": (Chart("", {"evaluation/*/accuracy_sampled": "", "evaluation/*/pass_at_*": ""}),),
    "What it is taught": (
        Chart(
            "Advantage",
            {"learner/advantage_repetitive": "repetitive tokens", "learner/advantage_other": "others"},
            help="log π_T − log π_θ, nats: inflation is fed where repetitive tokens have the higher one",
        ),
        Chart("Repetitive tokens", {"learner/repetitive_share": ""}),
        Chart("Log-probability", {"learner/student_logprob": "student", "learner/teacher_logprob": "teacher"}),
        Chart("Entropy", {"learner/entropy": ""}),
        Chart("Gradient norm", {"learner/grad_norm": ""}),
        Chart("End of sequence", {"learner/eos_*": ""}, help="what student and teacher think of stopping"),
    ),
    "Losses and KL terms": (Chart("", {"learner/loss*": "", "learner/*kl*": ""}),),
    "How the system ran": (
        Chart("Tokens per second", {"throughput/tokens_per_s": ""}),
        Chart("Staleness", {"staleness/mean": "mean", "staleness/max": "oldest token"}),
        Chart(_IDLE, {"idle/*": ""}, help="share of the time without work; --trace shows it as lanes"),
    ),
    _REST: (Chart("", {"*": ""}),),
}
_MAX_SERIES = 4
_MAX_VALUES = 900_000
"""Of all curves of the page together; a curve keeps between the two numbers below."""
_POINTS = (150, 2000)


def adjacent(runs: Sequence[Run]) -> int:
    """How many adjacent measurements the longest curve has one point for, so that the page stays small."""
    longest = max(len(values) for run in runs for values in run.metrics.values())
    return math.ceil(longest / _most_points(runs))


def _most_points(runs: Sequence[Run]) -> int:
    num_curves = sum(len(run.metrics) for run in runs)
    return min(_POINTS[1], max(_POINTS[0], _MAX_VALUES // num_curves))


def groups(runs: Sequence[Run], lines: Mapping[str, ReferenceLine], *, has_lanes: bool = False) -> list[dict[str, Any]]:
    """Groups of charts, in order, each chart with its runs' values; charts without any values are left out. Where the
    page ``has_lanes``, what is idle is seen there."""
    names = sorted({name for run in runs for name in run.metrics} - {"evaluation/num_problems"})
    drawn: set[str] = set()
    result = []
    for title, charts in _GROUPS.items():
        panels = []
        for chart in charts:
            if has_lanes and chart.title == _IDLE:
                continue
            for found in _expand(chart, names, drawn):
                drawn |= {*found.metrics, found.evaluation}
                panels.append(_panel(found, runs, lines))
        if panels:
            result.append({"title": title, "open": title != _REST, "panels": panels})
    return result


def _expand(chart: Chart, names: Sequence[str], drawn: set[str]) -> Iterator[Chart]:
    """The chart with the metrics there are, which may take several."""
    metrics = {
        name: label or _words(name.rpartition("/")[2])
        for pattern, label in chart.metrics.items()
        for name in fnmatch.filter(names, pattern)
        if name not in drawn
    }
    if not chart.title:
        for name in metrics:
            title = _words(name.removeprefix("learner/").replace("/", " "))
            meaning = f": {known.meaning}" if (known := metric(name)) else ""
            yield Chart(title[0].upper() + title[1:], {name: ""}, help=name + meaning)
    elif metrics or chart.evaluation in names:
        for start in range(0, max(len(metrics), 1), _MAX_SERIES):
            yield replace(chart, metrics=dict([*metrics.items()][start : start + _MAX_SERIES]))


def _words(name: str) -> str:
    known = {"kl": "KL", "eos": "EOS", "lr": "learning rate", "opd": "OPD", "sft": "SFT"}
    return " ".join(known.get(word, word) for word in name.replace("_", " ").split())


def _panel(chart: Chart, runs: Sequence[Run], lines: Mapping[str, ReferenceLine]) -> dict[str, Any]:
    drawn = [*chart.metrics, chart.evaluation] if chart.evaluation else [*chart.metrics]
    return {
        "title": chart.title,
        "help": (chart.help or metric(drawn[0]).meaning) + ("; ◇ held out" if chart.evaluation else ""),
        "share": getattr(metric(drawn[0]), "unit", "") == "share",  # of 1: the axis begins at 0
        "metrics": [*chart.metrics],
        "series": [
            {
                "name": label if len(chart.metrics) > 1 else "",
                "runs": _values(runs, name),
                "abandoned": _abandoned(runs, name),
            }
            for name, label in chart.metrics.items()
        ],
        "points": _values(runs, chart.evaluation),
        "lines": [{"y": lines[name].value, "text": lines[name].label} for name in drawn if name in lines],
    }


def _values(runs: Sequence[Run], name: str) -> list[list[list[float]] | None]:
    """Per run its steps and values; None where a run lacks the metric."""
    most, series = _most_points(runs), [run.metrics.get(name) for run in runs]
    return [_thinned(values, most) if values else None for values in series]


def _thinned(values: Mapping[int, float], most: int) -> list[list[float]]:
    """At most ``most`` points: means of as many adjacent measurements as that takes, at the last step of each."""
    steps, numbers = list(values), list(values.values())
    width = math.ceil(len(steps) / most)
    means = [statistics.fmean(numbers[i : i + width]) for i in range(0, len(numbers), width)]
    return [[steps[min(i + width, len(steps)) - 1] for i in range(0, len(steps), width)], [*map(_short, means)]]


def _abandoned(runs: Sequence[Run], metric: str) -> list[list[Any]]:
    """Run, number of the attempt, steps and values of each part that a run took back, from the step before it on."""
    parts = []
    for index, run in enumerate(runs):
        for number, attempt in enumerate(run.abandoned):
            values = attempt.metrics.get(metric, {})
            if steps := [step for step in values if attempt.first - 1 <= step]:
                parts.append([index, number, steps, [_short(values[step]) for step in steps]])
    return parts


def _short(value: float) -> float:
    return float(f"{value:.4g}")
