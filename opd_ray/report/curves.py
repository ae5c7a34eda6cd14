"""Which measurements become which chart, and the charts as data for the page's script.

A metric that no chart names still gets one, in the last group: what a run measured is never hidden.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.report.runs import Run


@dataclass(frozen=True)
class ReferenceLine:
    """A level to compare a curve with, such as the teacher's own truncation."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One panel: up to four metrics, told apart by their dashes, and the evaluation's points on top."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    """Metric name and what to call it beside the others."""
    help: str = ""
    evaluation: str = ""
    """Metric of held-out evaluations to draw as points."""
    share: bool = False
    """A share of 1: the axis begins at 0."""


def _one(title: str, metric: str, help: str = "", **options: Any) -> Chart:
    return Chart(title, ((metric, ""),), help, **options)


_GROUPS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "What the student writes",
        (
            _one("Accuracy", "rollouts/accuracy", "training rollouts that are right; ◇ held out, sampled",
                 evaluation="evaluation/accuracy_sampled", share=True),
            _one("Truncation", "rollouts/truncation_rate", "rollouts that exhausted the length budget; ◇ held out",
                 evaluation="evaluation/truncation_rate", share=True),
            _one("Length", "rollouts/length", "mean tokens of a rollout; ◇ held out",
                 evaluation="evaluation/mean_length"),
            _one("Repetition", "rollouts/repetition_rate", "rollouts whose tail compresses too well; ◇ held out",
                 evaluation="evaluation/repetition_rate", share=True),
            _one("Tokens in truncated rollouts", "rollouts/truncated_token_share",
                 "their share of the batch: the earliest alarm", share=True),
            _one("Greedy accuracy", "evaluation/accuracy_greedy", "held out, temperature 0", share=True),
        ),
    ),
    (
        "What it is taught",
        (
            Chart("Advantage",
                  (("learner/advantage_repetitive", "repetitive tokens"), ("learner/advantage_other", "others")),
                  "log π_T − log π_θ, nats: inflation is fed where repetitive tokens have the higher one"),
            _one("Repetitive tokens", "learner/repetitive_share", "share of tokens that end an n-gram seen before",
                 share=True),
            Chart("Log-probability", (("learner/student_logprob", "student"), ("learner/teacher_logprob", "teacher")),
                  "of the sampled tokens, nats"),
            _one("Entropy", "learner/entropy", "of the student, nats per token"),
            _one("Gradient norm", "learner/grad_norm", "before clipping"),
            Chart("End of sequence", (("learner/eos_*", ""),), "what student and teacher think of stopping"),
        ),
    ),
    ("Losses and KL terms", (_one("{}", "learner/loss*"), _one("{}", "learner/*kl*"))),
    (
        "How the system ran",
        (
            _one("Tokens per second", "throughput/tokens_per_s", "sampled by the student"),
            Chart("Staleness", (("staleness/mean", "mean"), ("staleness/max", "oldest token")),
                  "weight versions between sampling and training"),
            _one("{}", "idle/*", "share of the time without work", share=True),
        ),
    ),
)  # fmt: skip
_REST = "Everything else that was measured"
_MAX_SERIES = 4
_MAX_VALUES = 900_000
"""Of all curves of the page together; a curve keeps between the two numbers below."""
_POINTS = (150, 2000)


@dataclass(frozen=True)
class _Source:
    """What the panels are made of."""

    runs: Sequence[Run]
    lines: Mapping[str, ReferenceLine]
    most: int
    """Points of a curve."""


def adjacent(runs: Sequence[Run]) -> int:
    """How many adjacent measurements the longest curve has one point for, so that the page stays small."""
    longest = max(len(values) for run in runs for values in run.metrics.values())
    return math.ceil(longest / _most_points(runs))


def _most_points(runs: Sequence[Run]) -> int:
    num_curves = sum(len(run.metrics) for run in runs)
    return min(_POINTS[1], max(_POINTS[0], _MAX_VALUES // num_curves))


def groups(runs: Sequence[Run], lines: Mapping[str, ReferenceLine]) -> list[dict[str, Any]]:
    """Groups of charts, in order, each chart with its runs' values; charts without any values are left out."""
    names = sorted({name for run in runs for name in run.metrics})
    source = _Source(runs, lines, _most_points(runs))
    drawn: set[str] = set()
    result = []
    for title, charts in _GROUPS:
        panels = []
        for chart in charts:
            for found in _expand(chart, names, drawn):
                drawn |= {metric for metric, _ in found.metrics} | {found.evaluation}
                panels.append(_panel(found, source))
        if panels:
            result.append({"title": title, "open": True, "panels": panels})
    rest = [_one("{}", name) for name in names if name not in drawn and name != "evaluation/num_problems"]
    if rest:
        panels = [_panel(found, source) for chart in rest for found in _expand(chart, names, drawn)]
        result.append({"title": _REST, "open": False, "panels": panels})
    return result


def _expand(chart: Chart, names: Sequence[str], drawn: set[str]) -> Iterator[Chart]:
    """The chart with the metrics there are; one titled "{}" becomes a chart for each metric of its pattern."""
    metrics: list[tuple[str, str]] = []
    for pattern, label in chart.metrics:
        found = [name for name in fnmatch.filter(names, pattern) if name not in drawn]
        metrics += [(name, label or _words(name.rpartition("/")[2])) for name in found]
    if chart.title == "{}":
        for name, _ in metrics:
            title = _words(name.removeprefix("learner/").replace("/", " "))
            yield Chart(title[0].upper() + title[1:], ((name, ""),), chart.help or name, chart.evaluation, chart.share)
    elif metrics or chart.evaluation in names:
        for start in range(0, max(len(metrics), 1), _MAX_SERIES):
            part = tuple(metrics[start : start + _MAX_SERIES])
            yield Chart(chart.title, part, chart.help, chart.evaluation, chart.share)


def _words(name: str) -> str:
    return " ".join({"kl": "KL", "eos": "EOS", "lr": "learning rate", "opd": "OPD", "sft": "SFT"}.get(word, word)
                    for word in name.replace("_", " ").split())  # fmt: skip


def _panel(chart: Chart, source: _Source) -> dict[str, Any]:
    runs, lines = source.runs, source.lines
    return {
        "title": chart.title,
        "help": chart.help,
        "share": chart.share,
        "metrics": [metric for metric, _ in chart.metrics],
        "series": [
            {
                "name": label if len(chart.metrics) > 1 else "",
                "runs": _values(source, metric),
                "abandoned": _abandoned(runs, metric),
            }
            for metric, label in chart.metrics
        ],
        "points": _values(source, chart.evaluation),
        "lines": [
            {"y": lines[metric].value, "text": lines[metric].label}
            for metric in (*(name for name, _ in chart.metrics), chart.evaluation)
            if metric in lines
        ],
    }


def _values(source: _Source, metric: str) -> list[list[list[float]] | None]:
    """Per run its steps and values; None where a run lacks the metric."""
    series = [run.metrics.get(metric) for run in source.runs]
    return [_thinned(values, source.most) if values else None for values in series]


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
