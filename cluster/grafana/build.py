"""Builds opd-ray.json, the Grafana dashboard: `python cluster/grafana/build.py` writes it beside this file.

Panels are named by opd_ray's metrics, as ``rollouts/length``; ``*`` stands for a room, a loss or a source and gives
one line each. Every query keeps to the chosen cluster, session and run, and takes the maximum over a run's drivers:
after a restart the last values of the one before stay for half a minute.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.watch.metrics import port_name

OUTPUT = Path(__file__).with_name("opd-ray.json")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_FILTER = 'ray_io_cluster=~"$Cluster",SessionName=~"$SessionName",run=~"$Run"'
_WIDTH = 24


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
    """A curve over time, or with ``stat`` the latest value in large type; ``red`` colours values from there on."""

    title: str
    lines: tuple[Line, ...]
    about: str
    unit: str = "short"
    width: int = 8
    stat: bool = False
    red: float | None = None
    log: bool = False
    decimals: int | None = None


def _one(metric: str) -> str:
    return f"max by (run) (ray_{port_name(metric)}{{{_FILTER}}})"


def _many(pattern: str) -> str:
    before, after = (port_name(part).removeprefix("opd_") for part in pattern.split("*"))
    name = f"ray_opd_{before}(.+){after}"
    chosen = f'{{__name__=~"{name}",__name__!="ray_opd_restarts_total",{_FILTER}}}'
    return f'max by (run, part) (label_replace({chosen}, "part", "$1", "__name__", "{name}"))'


def _lines(*metrics: str) -> tuple[Line, ...]:
    return tuple(Line(metric) for metric in metrics)


def _share(title: str, metrics: tuple[Line, ...], about: str, **options: Any) -> Panel:
    return Panel(title, metrics, about, unit="percentunit", **options)


def _stat(title: str, metric: str, about: str, unit: str = "short", **options: Any) -> Panel:
    return Panel(title, (Line(metric, title),), about, unit, width=3, stat=True, **options)


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        _stat("Step", "run/step", "Finished optimizer steps.", decimals=0),
        _stat("Done", "{run/step} / {run/steps}", "Share of the planned steps.", "percentunit"),
        _stat("Since the last step", "run/since_step_s", "Grows while nothing is learned: see the rooms below.", "s"),
        _stat("Accuracy", "rollouts/accuracy", "Of the rollouts that the last step trained on.", "percentunit"),
        _stat(
            "Tokens/s", "throughput/tokens_per_s", "Response tokens of the student that were trained on.", decimals=0
        ),
        _stat("Learner idle", "idle/learn", "Share of the last step without work.", "percentunit", red=0.5),
        _stat("Restarts", "restarts/total", "Workers lost and replaced over the whole run.", red=8, decimals=0),
        _stat("Steps at risk", "{run/step} - {checkpoint/step}", "Lost if the driver died now.", decimals=0),
        _share(
            "Accuracy",
            (
                Line("rollouts/accuracy", "training rollouts"),
                Line("evaluation/accuracy_greedy", "held out, greedy"),
                Line("evaluation/accuracy_sampled", "held out, sampled"),
            ),
            "What the run is for. Falling accuracy with rising truncation is collapse.",
        ),
        Panel("Throughput", _lines("throughput/tokens_per_s"), "Response tokens of the student a second."),
        Panel(
            "Where a step's time goes",
            (
                Line("learner/wait_s", "waiting for rollouts"),
                Line("learner/train_s", "training"),
                Line("learner/weight_sync_s", "weight sync"),
                Line("throughput/step_s", "whole step"),
            ),
            "What is neither waiting, training nor sync is evaluation and checkpoints.",
            "s",
        ),
    ],
    "Rooms": [
        Panel("Ready workers", _lines("pool/*_ready"), "Workers that take calls.", decimals=0),
        Panel(
            "Starting workers",
            _lines("pool/*_starting"),
            "Placed or waiting to be placed; many and long: no nodes.",
            decimals=0,
        ),
        Panel(
            "Minimum", _lines("pool/*_minimum"), "A room below it for recovery.below_min_s ends the run.", decimals=0
        ),
        Panel(
            "Calls under way", _lines("queue/*_calls"), "Queued ones included: the room with many is the bottleneck."
        ),
        _share(
            "Idle", _lines("idle/*"), "Share of the time without a call. The room that is never idle is the bottleneck."
        ),
        Panel(
            "Slots and buffer",
            _lines("queue/slots_taken", "queue/buffer_slots"),
            "Prompts under way, and those that wait for the learner.",
        ),
    ],
    "Lengths, truncation, repetition": [
        Panel(
            "Response length",
            _lines("rollouts/length", "rollouts/length_p50", "rollouts/length_p95", "rollouts/length_budget"),
            "Tokens. A mean that climbs to the budget is length inflation.",
        ),
        _share(
            "Truncation",
            _lines("rollouts/truncation_rate", "rollouts/truncated_token_share", "evaluation/truncation_rate"),
            "Rollouts that ran out of their budget, and the share of tokens in them, which rises first.",
        ),
        _share(
            "Repetition",
            _lines("rollouts/repetition_rate", "rollouts/periodic_tail_rate", "learner/repetitive_share"),
            "Rollouts whose tail repeats itself, and repetitive tokens in the loss.",
        ),
    ],
    "Staleness": [
        Panel("Staleness", _lines("staleness/mean", "staleness/max"), "Weight versions between sampling and training."),
        Panel("Importance ratio", _lines("learner/importance_ratio"), "π_θ/μ over the sampled tokens; 1 is on policy."),
        Panel("Off-policy KL", _lines("learner/off_policy_kl"), "KL(μ‖π_θ), nats a token.", log=True),
    ],
    "Loss": [
        Panel("Loss", (Line("learner/loss", "all"), Line("learner/loss_*")), "All terms, and each alone."),
        Panel("Gradient norm", _lines("learner/grad_norm"), "Before clipping.", log=True),
        Panel(
            "Advantage", _lines("learner/advantage"), "log π_T − log π_θ of sampled tokens: minus the reverse KL, nats."
        ),
        Panel("Log-probs", _lines("learner/student_logprob", "learner/teacher_logprob"), "Of sampled tokens, nats."),
        Panel("Entropy", _lines("learner/entropy"), "Of the student, nats a token; near 0 it is deterministic."),
        Panel("Learning rate", _lines("learner/lr"), "As scheduled."),
    ],
    "Mixture": [
        Panel("Rollouts a step", _lines("mixture/*_rollouts"), "By source.", width=12),
        Panel(
            "Coefficients",
            _lines("mixture/*_coef"),
            "Weights of the terms; the guard raises golden and reference.",
            width=12,
        ),
    ],
    "Guard": [
        Panel(
            "Events",
            _lines("run/guard_events"),
            "Since this start of the run; events.jsonl says what they were.",
            decimals=0,
        ),
        Panel(
            "Advantage of repetitive tokens",
            _lines("learner/advantage_repetitive", "learner/advantage_other"),
            "The signature of inflation: repetitive tokens above the others, and enough of them.",
        ),
        Panel(
            "Teacher on repetitive tokens",
            _lines("learner/teacher_logprob_repetitive", "learner/teacher_logprob"),
            "Nats. From -1 on, the teacher endorses the repetition.",
        ),
    ],
    "Restarts and recovery": [
        Panel("Restarts by room", _lines("restarts/*"), "Workers lost and replaced over the whole run.", decimals=0),
        Panel(
            "Lost and made again",
            _lines("recovery/lost_payloads", "recovery/reissued_calls"),
            "Objects gone with a node; calls given to another worker.",
            decimals=0,
        ),
        Panel("Restores", _lines("recovery/restores"), "Times that the run went back to a snapshot.", decimals=0),
    ],
    "Weight sync": [
        Panel("Broadcast", _lines("learner/weight_sync_s"), "Seconds from the first tensor to the last answer.", "s"),
        Panel(
            "Members",
            _lines("weights/group_size"),
            "Processes in the transfer group, the learner included.",
            decimals=0,
        ),
        Panel(
            "Rebuilt and failed", _lines("weights/rebuilds", "weights/failed_broadcasts"), "Running counts.", decimals=0
        ),
    ],
    "Checkpoints": [
        Panel(
            "Last checkpoint",
            (Line("checkpoint/step", "checkpoint"), Line("run/step", "run")),
            "The gap is what a dead driver loses.",
            width=6,
            decimals=0,
        ),
        Panel("Writing", _lines("checkpoint/write_s"), "Seconds; the loop goes on meanwhile.", "s", width=6),
        Panel("Size", _lines("checkpoint/bytes"), "Of one checkpoint.", "bytes", width=6),
        Panel("Failed writes", _lines("checkpoint/failed_writes"), "Running count; tried again.", width=6, decimals=0),
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
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
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
        "description": panel.about,
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


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
