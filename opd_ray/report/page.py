"""The page: one HTML file with its data, its scripts and plotly inside, so that it opens anywhere, offline.

Text of runs reaches the page in two ways only, both safe: through the template, which escapes it, and as
compressed JSON in base64, which the scripts put into text nodes.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from opd_ray import __version__
from opd_ray.report import arms as arm_table
from opd_ray.report import curves, rollouts
from opd_ray.report.arms import MEASURES, Arm, steps_between
from opd_ray.report.curves import ReferenceLine
from opd_ray.report.runs import Run
from opd_ray.report.verdict import judge

_ASSETS = Path(__file__).parent / "assets"
_MAX_ROLLOUTS = 2000
_ROLLOUTS_PER_RUN = (40, 240)
"""Fewest and most that one run may embed; between them all runs share _MAX_ROLLOUTS."""
_SIZE = "@@SIZE@@"


def render(runs: Sequence[Run], title: str | None, lines: Mapping[str, ReferenceLine], notes: Sequence[str]) -> bytes:
    """The whole page as UTF-8."""
    arms = arm_table.group(runs)
    ordered = [run for arm in arms for run in arm.runs]
    least, most = _ROLLOUTS_PER_RUN
    samples = [rollouts.sample(run, min(most, max(least, _MAX_ROLLOUTS // len(runs)))) for run in ordered]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        title=title or _title(arms),
        verdict=judge(arms),
        arms=arms,
        notes=notes,
        facts=_facts(ordered),
        measures=[(measure, [measure.cell(arm) for arm in arms]) for measure in MEASURES],
        events=[(arm, run, event) for arm in arms for run in arm.runs for event in sorted(run.events, key=_step)],
        differences=_differences(arms),
        settings=[(f"{arm.title}, {_run_name(arm.runs[0])}", arm.runs[0].config) for arm in arms if arm.runs[0].config],
        viewer=_viewer_facts(ordered, samples),
        style=_asset("page.css"),
        scripts=[_asset(name) for name in ("unpack.js", "charts.js", "viewer.js")],
        plotly=_pack(_plotly()),
        data=_pack(json.dumps(_data(arms, ordered, samples, lines), separators=(",", ":")).encode()),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        size=_SIZE,
    )
    size = f"{len(page.encode()) / 1e6:.1f} MB"
    return page.replace(_SIZE, size).encode()


def _asset(name: str) -> Markup:
    return Markup((_ASSETS / name).read_text(encoding="utf-8"))


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().encode()


def _pack(content: bytes) -> Markup:
    return Markup(base64.b64encode(gzip.compress(content, 9, mtime=0)).decode())


def _data(
    arms: Sequence[Arm], runs: Sequence[Run], samples: Sequence[rollouts.Sample], lines: Mapping[str, ReferenceLine]
) -> dict[str, Any]:
    """What the scripts draw."""
    labels = [arm.label for arm in arms]
    return {
        "arms": [arm.title for arm in arms],
        "runs": [
            {
                "arm": labels.index(run.arm),
                "name": _run_name(run),
                "events": [_event(event) for event in run.events],
                "rollouts": part.rollouts,
                "vocab": part.vocab,
                "logged": part.num_logged,
                "note": part.note,
            }
            for run, part in zip(runs, samples, strict=True)
        ],
        "groups": curves.groups(runs, lines),
    }


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    names = ("step", "signal", "value", "threshold", "level", "action")
    return {name: event[name] for name in names if event.get(name) is not None}


def _step(event: Mapping[str, Any]) -> int:
    return event.get("step", 0)


def _run_name(run: Run) -> str:
    return run.path.name if run.seed is None else f"seed {run.seed}"


def _title(arms: Sequence[Arm]) -> str:
    if len(arms) > 3:
        return f"{len(arms)} arms, {sum(len(arm.runs) for arm in arms)} runs"
    if len(arms) > 1:
        return " · ".join(arm.title for arm in arms)
    (arm,) = arms
    return f"{arm.title}, {_run_name(arm.runs[0])}" if len(arm.runs) == 1 else arm.title


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was run, in a few words each."""
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    finished = sum(run.finished for run in runs)
    facts = [
        ("runs", f"{len(runs)}" if finished == len(runs) else f"{len(runs)}, {finished} finished"),
        ("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))),
        ("steps", steps_between([run.steps for run in runs])),
        ("task", _common(runs, "data.task")),
        ("student", _model(runs, "student.path")),
        ("teacher", _model(runs, "teacher.path")),
        ("length budget", _common(runs, "rollout.max_response_tokens", " tokens")),
    ]
    return [(name, value) for name, value in facts if value]


def _common(runs: Sequence[Run], field: str, unit: str = "") -> str:
    values = sorted({str(run.config[field]) for run in runs if run.config.get(field) is not None})
    return " / ".join(values) + unit if values else ""


def _model(runs: Sequence[Run], field: str) -> str:
    """The last two parts of a path say which model it is; seeds make several of one kind."""
    names = sorted({"/".join(Path(str(run.config[field])).parts[-2:]) for run in runs if run.config.get(field)})
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""


def _differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Settings in which arms differ, and each arm's value; what differs within an arm goes with the seed."""
    fields = sorted({name for arm in arms for run in arm.runs for name in run.config})
    rows = []
    for name in fields:
        values = [{json.dumps(run.config.get(name), default=str) for run in arm.runs} for arm in arms]
        if all(len(value) == 1 for value in values):
            cells = [value.pop() for value in values]
            if len(set(cells)) > 1:
                rows.append((name, cells))
    return rows


def _viewer_facts(runs: Sequence[Run], samples: Sequence[rollouts.Sample]) -> dict[str, Any]:
    temperatures = {run.config.get("rollout.temperature", 1.0) for run in runs}
    return {
        "shown": sum(len(part.rollouts) for part in samples),
        "logged": sum(part.num_logged for part in samples),
        "changed": temperatures != {1.0} or {run.config.get("rollout.top_p", 1.0) for run in runs} != {1.0},
    }
