"""Builds opd-ray.json, the Grafana dashboard, and the table in README.md, both from the catalogue of metrics:
`python cluster/grafana/build.py` writes them beside this file.

Panels are named by opd_ray's metrics, as ``rollouts/length``; ``*`` stands for a room, a loss or a source and gives
one line each. Every query keeps to the chosen cluster, session and run, and takes the maximum over a run's drivers:
after a restart the last values of the one before stay for half a minute.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_ray.watch.catalogue import METRICS, Metric
from opd_ray.watch.metrics import port_name

OUTPUT, README = (Path(__file__).with_name(name) for name in ("opd-ray.json", "README.md"))
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_FILTER = 'ray_io_cluster=~"$Cluster",SessionName=~"$SessionName",run=~"$Run"'
_WIDTH = 24
_UNITS = {"share": "percentunit", "s": "s", "bytes": "bytes"}
"""Grafana's names of units; all others are plain numbers."""
_WHOLE = ("number", "steps", "tokens/s")


@dataclass(frozen=True)
class Line:
    """One query: a metric, a pattern of metrics, or PromQL with metrics in braces."""

    metric: str
    legend: str = ""

    @property
    def expr(self) -> str:
        if "{" in self.metric:
            return re.sub(r"{(.+?)}", lambda found: _one(found[1]), self.metric)
        return _many(self.metric) if "*" in self.metric else _one(self.metric)

    @property
    def label(self) -> str:
        which = "{{part}}" if "*" in self.metric else self.legend or self.metric.partition("/")[2].replace("_", " ")
        return f"{which} · {{{{run}}}}"


@dataclass(frozen=True)
class Panel:
    """A curve over time, or with ``stat`` the latest value in large type; ``red`` colours values from there on.

    Without ``about`` and ``unit`` it says of its first metric what the table of metrics says.
    """

    title: str
    lines: tuple[Line, ...]
    about: str = ""
    unit: str = ""
    width: int = 8
    stat: bool = False
    red: float | None = None
    log: bool = False

    @property
    def shown(self) -> Metric:
        """The first metric, with the panel's own words and unit where it has some."""
        first = METRICS.get(self.lines[0].metric) or Metric("", "factor", "")
        return replace(first, unit=self.unit or first.unit, meaning=self.about or sentence(first.meaning))


def sentence(meaning: str) -> str:
    return f"{meaning[0].upper()}{meaning[1:]}." if meaning else ""


def _one(metric: str) -> str:
    return f"max by (run) (ray_{port_name(metric)}{{{_FILTER}}})"


def _many(pattern: str) -> str:
    before, after = (port_name(part).removeprefix("opd_") for part in pattern.split("*"))
    name = f"ray_opd_{before}(.+){after}"
    chosen = f'{{__name__=~"{name}",__name__!="ray_opd_restarts_total",{_FILTER}}}'
    return f'max by (run, part) (label_replace({chosen}, "part", "$1", "__name__", "{name}"))'


def _curve(title: str, *metrics: str, about: str = "", **options: Any) -> Panel:
    return Panel(title, tuple(map(Line, metrics)), about, **options)


def _stat(title: str, metric: str, about: str = "", **options: Any) -> Panel:
    return Panel(title, (Line(metric, title),), about, width=3, stat=True, **options)


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        _stat("Step", "run/step"),
        _stat("Done", "{run/step} / {run/steps}", "Share of the planned steps.", unit="share"),
        _stat("Since the last step", "run/since_step_s"),
        _stat("Accuracy", "rollouts/accuracy"),
        _stat("Tokens/s", "throughput/tokens_per_s"),
        _stat("Learner idle", "idle/learn", "Share of the last step without work.", unit="share", red=0.5),
        _stat("Restarts", "restarts/total", red=8),
        _stat("Steps at risk", "{run/step} - {checkpoint/step}", "Lost if the driver died now.", unit="steps"),
        Panel(
            "Accuracy",
            (
                Line("rollouts/accuracy", "training rollouts"),
                Line("evaluation/accuracy_greedy", "held out, greedy"),
                Line("evaluation/accuracy_sampled", "held out, sampled"),
                Line("evaluation/*/accuracy_sampled"),
            ),
            "What the run is for. Falling accuracy with rising truncation is collapse.",
        ),
        _curve("Throughput", "throughput/tokens_per_s"),
        Panel(
            "Where a step's time goes",
            (
                Line("learner/wait_s", "waiting for rollouts"),
                Line("learner/train_s", "training"),
                Line("learner/weight_sync_s", "weight sync"),
                Line("throughput/step_s", "whole step"),
            ),
            "What is neither waiting, training nor sync is evaluation and checkpoints.",
        ),
    ],
    "Rooms": [
        _curve("Ready workers", "pool/*_ready"),
        _curve("Starting workers", "pool/*_starting"),
        _curve("Minimum", "pool/*_minimum"),
        _curve("Calls under way", "queue/*_calls"),
        _curve(
            "Idle", "idle/*", about="Share of the time without a call. The room that is never idle is the bottleneck."
        ),
        _curve(
            "Slots and buffer",
            "queue/slots_taken",
            "queue/buffer_slots",
            about="Prompts under way, and those that wait for the learner.",
        ),
        _curve("Memory of the driver", "driver/memory_bytes"),
    ],
    "Lengths, truncation, repetition": [
        _curve(
            "Response length",
            "rollouts/length",
            "rollouts/length_p50",
            "rollouts/length_p95",
            "rollouts/length_budget",
            about="Tokens. A mean that climbs to the budget is length inflation.",
        ),
        _curve(
            "Truncation",
            "rollouts/truncation_rate",
            "rollouts/truncated_token_share",
            "evaluation/truncation_rate",
            about="Rollouts that ran out of their budget, and the share of tokens in them, which rises first.",
        ),
        _curve(
            "Repetition",
            "rollouts/repetition_rate",
            "rollouts/periodic_tail_rate",
            "learner/repetitive_share",
            about="Rollouts whose tail repeats itself, and repetitive tokens in the loss.",
        ),
    ],
    "Staleness": [
        _curve("Staleness", "staleness/mean", "staleness/max"),
        _curve("Importance ratio", "learner/importance_ratio"),
        _curve("Off-policy KL", "learner/off_policy_kl", log=True),
    ],
    "Loss": [
        Panel("Loss", (Line("learner/loss", "all"), Line("learner/loss_*")), "All terms, and each alone."),
        _curve("Gradient norm", "learner/grad_norm", log=True),
        _curve("Advantage", "learner/advantage"),
        _curve("Log-probs", "learner/student_logprob", "learner/teacher_logprob", about="Of sampled tokens, nats."),
        _curve("Entropy", "learner/entropy"),
        _curve("Learning rate", "learner/lr"),
    ],
    "Mixture": [
        _curve("Rollouts a step", "mixture/*_rollouts", width=12),
        _curve("Coefficients", "mixture/*_coef", width=12),
    ],
    "Guard": [
        _curve("Events", "run/guard_events"),
        _curve(
            "Advantage of repetitive tokens",
            "learner/advantage_repetitive",
            "learner/advantage_other",
            about="The signature of inflation: repetitive tokens above the others, and enough of them.",
        ),
        _curve(
            "Teacher on repetitive tokens",
            "learner/teacher_logprob_repetitive",
            "learner/teacher_logprob",
            about="Nats. From -1 on, the teacher endorses the repetition.",
        ),
    ],
    "Restarts and recovery": [
        _curve("Restarts by room", "restarts/*"),
        _curve(
            "Lost and made again",
            "recovery/lost_payloads",
            "recovery/reissued_calls",
            about="Objects gone with a node; calls given to another worker.",
        ),
        _curve("Restores", "recovery/restores"),
    ],
    "Weight sync": [
        _curve("Broadcast", "learner/weight_sync_s"),
        _curve("Members", "weights/group_size"),
        _curve("Rebuilt and failed", "weights/rebuilds", "weights/failed_broadcasts", about="Running counts."),
    ],
    "Checkpoints": [
        Panel(
            "Last checkpoint",
            (Line("checkpoint/step", "checkpoint"), Line("run/step", "run")),
            "The gap is what a dead driver loses.",
            width=6,
        ),
        _curve("Writing", "checkpoint/write_s", width=6),
        _curve("Size", "checkpoint/bytes", width=6),
        _curve(
            "Failed and skipped", "checkpoint/failed_writes", "checkpoint/skipped", about="Running counts.", width=6
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's file provisioning reads it."""
    panels: list[dict[str, Any]] = []
    ids, y = itertools.count(1), 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": next(ids),
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, y, _WIDTH, 1),
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > _WIDTH:
                x, y = 0, y + height
            height = 4 if panel.stat else 8
            panels.append(_panel(panel, next(ids), _at(x, y, panel.width, height)))
            x += panel.width
        y += height
    return {
        "uid": "opdRayDashboard",
        "title": "opd_ray",
        "description": "On-policy distillation: rooms, lengths, staleness, loss, guard, recovery, weight sync.",
        "tags": ["opd_ray", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"h": height, "w": width, "x": x, "y": y}


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green" if panel.stat else "text", "value": None}]
    if panel.red is not None:
        steps.append({"color": "red", "value": panel.red})
    unit = panel.shown.unit
    defaults: dict[str, Any] = {"unit": _UNITS.get(unit, "short"), "thresholds": {"mode": "absolute", "steps": steps}}
    if unit in _WHOLE:
        defaults["decimals"] = 0
    if panel.stat:
        options: dict[str, Any] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "value",
        }
    else:
        scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 0, "showPoints": "never", "scaleDistribution": scale}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.shown.meaning,
        "datasource": _SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": line.expr,
                "legendFormat": line.label,
                "range": True,
            }
            for i, line in enumerate(panel.lines)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    """The datasource, as Ray's own dashboards choose it, and what the queries keep to."""
    step = f"ray_{port_name('run/step')}"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 2},
        _variable("Cluster", "ray_io_cluster", step, "Clusters of KubeRay; elsewhere there is no such label."),
        _variable("SessionName", "SessionName", f'{step}{{ray_io_cluster=~"$Cluster"}}', "Sessions of Ray."),
        _variable(
            "Run",
            "run",
            f'{step}{{ray_io_cluster=~"$Cluster",SessionName=~"$SessionName"}}',
            "The last two names of a run's directory; the same after a resume.",
            multi=True,
        ),
    ]


def _variable(name: str, label: str, metric: str, about: str, *, multi: bool = False) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "type": "query",
        "description": about,
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 2,
        "hide": 0,
        "includeAll": True,
        "multi": multi,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"] if multi else "All", "value": ["$__all"] if multi else "$__all"},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def readme() -> str:
    """README.md with the table of metrics as the catalogue has it now."""
    before, head, rest = README.read_text(encoding="utf-8").partition("| metric | unit | what it is | alerts |\n")
    table = rest.partition("\n\n")[0]
    rows = [
        f"| `{each.name}` | {each.unit} | {each.meaning.replace('|', chr(92) + '|')} | {each.alerts} |"
        for each in METRICS.values()
    ]
    return before + head + "\n".join(["|---|---|---|---|", *rows]) + rest.removeprefix(table)


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
