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

from opd_ray.report.measurements import SO_FAR
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
    guarded: str = field(default="", kw_only=True)
    """The guard's signal whose thresholds are drawn: without them the noise of a healthy run looks like a spike."""
    least: float | None = field(default=None, kw_only=True)
    """The axis begins at 0 and ends no lower than this."""
    help: str = field(default="", kw_only=True)
    """Empty: what the first metric means."""


def _guarded(title: str, signal: str, evaluation: str = "") -> Chart:
    """A share of rollouts that the guard looks at."""
    return Chart(title, {f"rollouts/{signal}": ""}, evaluation, guarded=signal, least=0.1)


_ERROR = "_se"
"""Ends the name of a metric that is another's standard error."""
_AXES = {"tokens": ("learner/trained_tokens", 1.0), "minutes": ("throughput/step_s", 1 / 60)}
"""What curves may be drawn over, besides steps: what a step takes of it."""
_IDLE = "Idle"
_REST = "Everything else that was measured"
_GROUPS: dict[str, tuple[Chart, ...]] = {
    "What the student writes": (
        Chart("Accuracy", {"rollouts/accuracy": ""}, "evaluation/accuracy_sampled", least=1.0),
        _guarded("Truncation", "truncation_rate", "evaluation/truncation_rate"),
        Chart("Length", {"rollouts/length": ""}, "evaluation/mean_length", least=0.0),
        _guarded("Repetition", "repetition_rate", "evaluation/repetition_rate"),
        _guarded("Tokens in truncated rollouts", "truncated_token_share"),
        Chart("Greedy accuracy", {"evaluation/accuracy_greedy": ""}, least=1.0),
    ),
    "Held-out sets": (Chart("", {"evaluation/*/accuracy_sampled": "", "evaluation/*/pass_at_*": ""}),),
    "What it is taught": (
        Chart(
            "Advantage",
            {"learner/advantage_repetitive": "repetitive tokens", "learner/advantage_other": "others"},
            help="log π_T − log π_θ, nats: inflation is fed where repetitive tokens have the higher one",
        ),
        Chart("Repetitive tokens", {"learner/repetitive_share": ""}, least=0.1),
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
    names = {name for run in runs for name in run.metrics if not name.endswith(SO_FAR)}
    names = sorted(names - {"evaluation/num_problems"})
    drawn: set[str] = set()
    result = []
    for title, charts in _GROUPS.items():
        panels = []
        for chart in charts:
            if has_lanes and chart.title == _IDLE:
                drawn |= {*fnmatch.filter(names, *chart.metrics)}
                continue
            for found in _expand(chart, names, drawn):
                drawn |= {name + suffix for name in (*found.metrics, found.evaluation) for suffix in ("", _ERROR)}
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
    unit = getattr(metric(drawn[0]), "unit", "")
    levels = [(lines[name].value, lines[name].label) for name in drawn if name in lines]
    levels += [(value, f"guard {does} at") for does, value in _thresholds(runs, chart.guarded)]
    return {
        "title": chart.title,
        "help": (chart.help or metric(drawn[0]).meaning) + ("; ◇ held out" if chart.evaluation else ""),
        "unit": unit if unit not in ("number", "factor") else "",
        "least": 0.0 if chart.least is None and unit == "share" else chart.least,
        "metrics": [*chart.metrics],
        "series": [
            {
                "name": label if len(chart.metrics) > 1 else "",
                "runs": _values(runs, name),
                "errors": _errors(runs, name),
                "abandoned": _abandoned(runs, name),
            }
            for name, label in chart.metrics.items()
        ],
        "points": _values(runs, chart.evaluation),
        "errors": _errors(runs, chart.evaluation),
        "lines": [{"y": value, "text": text} for value, text in levels],
    }


def _thresholds(runs: Sequence[Run], signal: str) -> list[tuple[str, float]]:
    """What the guard does, and from which level on where a run's normal one is 0; nothing where runs are not alike."""
    field, level = f"guard.{signal}", "guard.level"
    known = [(run.config[field], run.config.get(level)) for run in runs if run.config.get(field)]
    on = [each for each in known if each[1] != "off"]
    if not on or any(values != on[0][0] for values, _ in on):
        return []
    acts = any(most != "warn" for _, most in on)
    return [*zip(("warns", "acts") if acts else ("warns",), on[0][0], strict=False)]


def _errors(runs: Sequence[Run], name: str) -> list[list[list[float]] | None] | None:
    """Standard errors where they were measured, or where one answer to each problem tells them."""
    if name.endswith("/accuracy_greedy"):
        prefix = name.removesuffix("accuracy_greedy")
        return [_of_shares(run.metrics.get(name), run.metrics.get(f"{prefix}num_problems")) for run in runs]
    values = _values(runs, name + _ERROR)
    return values if any(values) else None


def _of_shares(shares: Mapping[int, float] | None, counts: Mapping[int, float] | None) -> list[list[float]] | None:
    if not shares or not counts:
        return None
    steps = [step for step in shares if counts.get(step)]
    return [steps, [_short(math.sqrt(shares[step] * (1 - shares[step]) / counts[step])) for step in steps]]


def axes(run: Run) -> dict[str, list[list[float]]]:
    """What a run had taken of tokens and minutes after its steps, of those steps that count; without what was not
    measured."""
    found = {}
    for name, (source, factor) in _AXES.items():
        if sums := run.metrics.get(source + SO_FAR):
            found[name] = _sparse({0: 0.0} | {step: factor * value for step, value in sums.items()})
    return found


def _sparse(sums: Mapping[int, float]) -> list[list[float]]:
    """Every n-th and the last: sums are smooth."""
    steps = [*sums]
    steps = sorted({*steps[:: math.ceil(len(steps) / _POINTS[0])], steps[-1]})
    return [steps, [_short(sums[step]) for step in steps]]


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
