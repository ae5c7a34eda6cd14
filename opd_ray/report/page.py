"""The page: one HTML file with its data, its scripts and plotly inside, so that it opens anywhere, offline.

Text of runs reaches the page in two ways only, both safe: through the template, which escapes it, and as
compressed JSON in base64, which the scripts put into text nodes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from opd_ray import __version__
from opd_ray.models import hub
from opd_ray.report import arms as arm_table
from opd_ray.report import crossing, curves, golden, lanes, maps, rollouts, sets, trust
from opd_ray.report.arms import MEASURES, Arm, steps_between
from opd_ray.report.curves import ReferenceLine
from opd_ray.report.runs import Run
from opd_ray.report.verdict import judge

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("unpack.js", "table.js", "charts.js", "golden.js", "lanes.js", "viewer.js")
_MAX_ROLLOUTS, _MAX_TOKENS = 3000, 400_000
"""Of the rollouts that all runs embed together, prompts included; the runs share them alike."""
_ROLLOUTS_PER_RUN = 240
_SHOWN_AT_FIRST = 7
"""Arms whose curves are drawn at first where there are more than eight."""
_MANY_EVENTS = 12
"""With more events than this, warnings are folded away."""
_MOST_ORIGINS = 5
"""Of the commands (and the like) of all runs that are shown."""
_SIZE = "@@SIZE@@"


def render(
    runs: Sequence[Run],
    *,
    title: str | None,
    lines: Mapping[str, ReferenceLine],
    notes: Sequence[str],
    order: Sequence[str],
    signals: rollouts.Signals | None,
) -> bytes:
    """The whole page as UTF-8; see :func:`opd_ray.report.write_report`."""
    arms = arm_table.group(runs, order)
    ordered = [run for arm in arms for run in arm.runs]
    most = min(_ROLLOUTS_PER_RUN, max(1, _MAX_ROLLOUTS // len(runs)))
    most_tokens = _MAX_TOKENS // len(runs)
    if signals is None:
        samples = [rollouts.sample(run, most, most_tokens) for run in ordered]
    else:
        samples = [rollouts.of_step(run, signals, most, most_tokens) for run in ordered]
    kinds, passed = golden.kinds(arms), crossing.crossings(arms)
    drawn = lanes.lanes(ordered)
    events = [(arm, run, event) for arm in arms for run in arm.runs for event in sorted(run.events, key=_step)]
    warnings = [row for row in events if row[2].get("level") == "warn"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "nats": _nats,
        "shade": maps.shade,
        "share": lambda value: "–" if value is None else arm_table.share(value),
    }
    scripts, plotly = list(map(_asset, _SCRIPTS)), get_plotlyjs()
    page = environment.get_template("page.html.j2").render(
        policy=_policy([*scripts, plotly]),
        title=title or _title(arms),
        verdict=judge(arms),
        arms=arms,
        index={arm.label: index for index, arm in enumerate(arms)},
        many=len(arms) > arm_table.MANY,
        notes=notes,
        facts=_facts(ordered),
        table=_table(arms),
        sets=sets.rows(arms),
        crossings=passed,
        signature=crossing.signature(passed),
        window=crossing.WINDOW,
        alarm=arm_table.share(crossing.ALARM),
        kinds=kinds,
        maps=maps.maps(arms),
        mapped=maps.MAPPED,
        trusts=trust.trusts(arms),
        choices=trust.CHOICES,
        lanes=drawn,
        sizes=_sizes(kinds),
        adjacent=curves.adjacent(runs),
        marks=_marks(runs),
        events=events,
        actions=[row for row in events if row not in warnings],
        folded=warnings if len(events) > _MANY_EVENTS else [],
        differences=_differences(arms),
        origin=_origin(ordered),
        settings=[(f"{arm.title}, {arm.runs[0].name}", arm.runs[0].config) for arm in arms if arm.runs[0].config],
        viewer=_viewer(runs, samples) | {"most": most, "most_tokens": most_tokens},
        style=_asset("page.css"),
        scripts=scripts,
        plotly=_pack(plotly),
        data=_pack(json.dumps(_data(arms, ordered, samples, lines, kinds, drawn), separators=(",", ":"))),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        size=_SIZE,
    )
    size = f"{len(page.encode()) / 1e6:.1f} MB"
    return page.replace(_SIZE, size).encode()


def _viewer(runs: Sequence[Run], samples: Sequence[rollouts.Sample]) -> dict[str, Any]:
    """How many rollouts are shown of those that were logged, and whether any were sampled at other settings than 1."""
    settings = [run.config.get(f"rollout.{name}", 1.0) for run in runs for name in ("temperature", "top_p")]
    return {
        "shown": sum(len(part.rollouts) for part in samples),
        "logged": sum(part.logged for part in samples),
        "changed": any(value != 1 for value in settings),
        "signals": any(part.signals for part in samples),
    }


def _asset(name: str) -> Markup:
    return Markup((_ASSETS / name).read_text(encoding="utf-8"))


def _policy(scripts: Sequence[str]) -> Markup:
    """Nothing is fetched, sent or framed, and no script runs but these, whatever the text of a run would be."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    images = "img-src data: blob:"  # of plotly's download button
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; {images}; base-uri 'none'"
    return Markup(f"{policy}; form-action 'none'")


def _pack(content: str) -> Markup:
    return Markup(base64.b64encode(gzip.compress(content.encode(), mtime=0, compresslevel=6)).decode())


def _data(
    arms: Sequence[Arm],
    runs: Sequence[Run],
    samples: Sequence[rollouts.Sample],
    lines: Mapping[str, ReferenceLine],
    kinds: Sequence[golden.Kind],
    drawn: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the scripts draw."""
    labels = [arm.label for arm in arms]
    return {
        "arms": [arm.title for arm in arms],
        "shown": _SHOWN_AT_FIRST if len(arms) > _SHOWN_AT_FIRST + 1 else len(arms),
        "runs": [
            {
                "arm": labels.index(run.arm),
                "name": run.name,
                "events": _events(run),
                "axes": curves.axes(run),
                "abandoned": [[attempt.first, attempt.last, attempt.rolled_back] for attempt in run.abandoned],
                **vars(part),
            }
            for run, part in zip(runs, samples, strict=True)
        ],
        "golden": [
            {"name": kind.label, "arm": labels.index(kind.arms[0].label), "points": kind.points} for kind in kinds
        ],
        "lanes": drawn,
        "groups": curves.groups(runs, lines, has_lanes=len(drawn) == len(runs)),
    }


def _events(run: Run) -> list[dict[str, Any]]:
    """The guard's events, each with the abandoned attempt that it belongs to, if it does."""
    names = ("step", "signal", "value", "threshold", "level", "action")
    ended = [index for index, attempt in enumerate(run.abandoned) if attempt.rolled_back]
    shown = []
    for event in run.events:
        known = {name: event[name] for name in names if event.get(name) is not None}
        if ended and _step(event) >= run.abandoned[ended[0]].first:
            known["attempt"] = ended[0]
        if ended and event.get("level") == "rollback":
            del ended[0]
        shown.append(known)
    return shown


def _marks(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The signs that are on the charts, each with what it says."""
    levels = {event.get("level") for run in runs for event in run.events}
    marks = [("◇", "held out"), ("┃", "± 1 standard error, or from the lowest seed to the highest")]
    names = {
        "warn": ("▲", "warns"),
        "act": ("★", "acts"),
        "rollback": ("◀", "goes back"),
        "stop": ("✖", "ends the run"),
    }
    marks += [(sign, f"the guard {does}") for level, (sign, does) in names.items() if level in levels]
    if any(not attempt.rolled_back for run in runs for attempt in run.abandoned):
        marks.append(("◁", "cut off, and resumed from an earlier step"))
    if any(run.abandoned for run in runs):
        marks.append(("┈", "faint: steps that a run abandoned when it went back"))
    marks.append(("┄", "where the guard warns and acts, counted from a run's normal level"))
    return marks


def _step(event: Mapping[str, Any]) -> int:
    return event.get("step", 0)


def _title(arms: Sequence[Arm]) -> str:
    if len(arms) > 3:
        return f"{len(arms)} arms, {sum(len(arm.runs) for arm in arms)} runs"
    if len(arms) > 1:
        return " · ".join(arm.title for arm in arms)
    (arm,) = arms
    return f"{arm.title}, {arm.runs[0].name}" if len(arm.runs) == 1 else arm.title


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was run, in a few words each."""
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    finished, budgets = sum(run.finished for run in runs), _seen(runs, "rollout.max_response_tokens", _plain)
    facts = [
        ("runs", f"{len(runs)}" if finished == len(runs) else f"{len(runs)}, {finished} finished"),
        ("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))),
        ("steps", steps_between([run.steps for run in runs])),
        ("task", " / ".join(_seen(runs, "data.task", str))),
        ("student", _model(runs, "student.path")),
        ("teacher", _model(runs, "teacher.path")),
        ("teacher's servers", " / ".join(_seen(runs, "teacher.url", ", ".join))),
        ("length budget", " / ".join(budgets) + (" tokens" if budgets else "")),
    ]
    return [(name, value) for name, value in facts if value]


def _origin(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What the runs were made with: name, and each value that any of them had."""
    readers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "hardware": lambda known: "; ".join(map(str, known.get("hardware") or ())),
        "packages": lambda known: ", ".join(f"{name} {of}" for name, of in (known.get("versions") or {}).items()),
        "commit": lambda known: known.get("commit"),
        "command": lambda known: known.get("command"),
    }
    rows = [
        (name, [*dict.fromkeys(str(read(run.origin)) for run in runs if read(run.origin))])
        for name, read in readers.items()
    ]
    more = [
        (name, [*values[:_MOST_ORIGINS], f"and {len(values) - _MOST_ORIGINS} more"])
        for name, values in rows
        if len(values) > _MOST_ORIGINS
    ]
    return [(name, dict(more).get(name, values)) for name, values in rows if values]


def _seen(runs: Sequence[Run], field: str, show: Callable[[Any], str]) -> list[str]:
    return sorted({show(run.config[field]) for run in runs if run.config.get(field) is not None})


def _plain(value: Any) -> str:
    """80.0 is written 80."""
    return f"{value:,.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _model(runs: Sequence[Run], field: str) -> str:
    """The last two parts of a path say which model it is; seeds make several of one kind."""
    names = _seen(runs, field, lambda path: hub.shown("/".join(Path(str(path)).parts[-2:])))
    return "".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Settings in which arms differ, and each arm's value; what differs within an arm goes with the seed."""
    fields = sorted({name for arm in arms for run in arm.runs for name in run.config if name != "name"})
    # A seed has its own golden file, so that arms differ in the size of theirs is known from the summary only.
    readers = {"golden rollouts used": lambda run: run.golden_used if run.summary else None}
    readers |= {name: lambda run, name=name: run.config.get(name) for name in fields}
    rows = []
    for name, read in readers.items():
        values = [{json.dumps(read(run), default=str) for run in arm.runs} for arm in arms]
        cells = [value for each in values for value in each]
        if len(cells) == len(arms) and len(set(cells)) > 1:
            rows.append((name, cells))
    return rows


def _table(arms: Sequence[Arm]) -> dict[str, Any]:
    """Measures with a cell for each arm. With many arms, those that are the same for all are said once instead."""
    rows = [(measure, [measure.cell(arm) for arm in arms]) for measure in MEASURES]
    many = len(arms) > arm_table.MANY
    same = [row for row in rows if many and len({(cell.text, cell.each) for cell in row[1]}) == 1]
    return {
        "measures": [row for row in rows if row not in same],
        "same": [(measure.title, cells[0].text) for measure, cells in same],
        "seeds": sorted({len(arm.runs) for arm in arms}),
    }


def _sizes(kinds: Sequence[golden.Kind]) -> list[tuple[int, list[str]]]:
    """Sizes of golden sets, and the accuracy of each kind: its mean and spread, or "–"."""
    sizes = sorted({size for kind in kinds for size, _ in kind.points})
    return [(size, [kind.at(size).text(arm_table.share) for kind in kinds]) for size in sizes]
