"""A replayed step as a table, and for the report's viewer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_ray.replay.step import SIGNALS

if TYPE_CHECKING:
    from opd_ray.messages import Entry
    from opd_ray.report.rollouts import Signals
    from opd_ray.run.replay import Replay

_ROWS = ("loss", "loss_student", "loss_golden", "loss_teacher", "loss_reference", "grad_norm", "advantage", "entropy")
_SHOWN = 40
"""Tokens of the rollout that the terminal shows: those with the largest gradient, in their order."""


def columns(replay: Replay) -> dict[str, dict[str, np.ndarray]]:
    """Name of a configuration to the signals of each rollout."""
    found = {"as configured": replay.again.tokens}
    if replay.instead is not None:
        found[" ".join(replay.overrides)] = replay.instead.tokens
    return found


def signals(replay: Replay) -> Signals:
    """What the viewer colours by and says of each token."""
    from opd_ray.report.rollouts import Signals

    of = {
        f"{name}, {title}": {rollout: values[:, at] for rollout, values in tokens.items()}
        for title, tokens in columns(replay).items()
        for at, name in enumerate(SIGNALS)
    }
    return Signals(replay.step, of)


def write_page(replay: Replay, output: Path) -> None:
    """The report of the run, its rollouts those of the step. Raises InputError where ``output`` cannot be written."""
    from opd_ray.report import write_report

    what = " ".join(replay.overrides) or "as configured"
    notes = [f"Rollouts of step {replay.step}, {what}: choose what colours them.", *filter(None, [replay.remark])]
    title = f"{replay.run_dir.name}, step {replay.step} again"
    write_report([replay.run_dir], output, title=title, notes=notes, signals=signals(replay))


def plain(replay: Replay, rollout_id: str | None) -> dict[str, Any]:
    """For JSON: the step, and one rollout or all of them; null is what is no number."""

    def of(entry: Entry, values: np.ndarray) -> dict[str, list[float | None]]:
        return {
            name: [float(v) if math.isfinite(v) else None for v in values[:, at]] for at, name in enumerate(SIGNALS)
        }

    def numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    each = columns(replay)
    return {
        "step": replay.step,
        "overrides": list(replay.overrides),
        "logged": replay.logged,
        "again": numbers(replay.again.metrics),
        "instead": numbers(replay.instead.metrics) if replay.instead else None,
        "rollouts": [
            {
                "rollout_id": entry.meta.rollout_id,
                "source": entry.meta.source,
                "tokens": entry.rollouts["response_tokens"][entry.row].as_py(),
                "signals": {title: of(entry, tokens[entry.meta.rollout_id]) for title, tokens in each.items()},
            }
            for entry in replay.entries
            if rollout_id in (None, entry.meta.rollout_id)
        ],
    }


def show(replay: Replay, rollout_id: str | None) -> None:
    """Two tables on the terminal: the step, and one rollout token by token, by default that of the student (if there is
    one) with the largest gradient."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from opd_ray.models.checkpoints import load_tokenizer

    entry = _chosen(replay, rollout_id)
    console, each = Console(soft_wrap=True), columns(replay)
    console.print(f"step {replay.step} of {replay.run_dir}, {len(replay.entries)} rollouts", markup=False)
    table = Table("", "logged", *each)
    found = [replay.again.metrics, *([replay.instead.metrics] if replay.instead else [])]
    for name in _ROWS:
        if any(name in metrics for metrics in found):
            values = [replay.logged.get(f"learner/{name}"), *(metrics.get(name) for metrics in found)]
            table.add_row(name, *("–" if value is None else f"{value:.6g}" for value in values))
    console.print(table)
    if replay.remark:
        console.print(replay.remark, markup=False, highlight=False)
    tokenizer = load_tokenizer(replay.tokenizer_path)
    ids = entry.rollouts["response_tokens"][entry.row].as_py()
    sizes = sum(tokens[entry.meta.rollout_id][:, SIGNALS.index("size")] for tokens in each.values())
    places = sorted(np.argsort(-sizes, kind="stable")[:_SHOWN].tolist())
    left = len(ids) - len(places)
    console.print(
        f"rollout {entry.meta.rollout_id} ({entry.meta.source}), in units of the mean token"
        + (f"; ′: {' '.join(replay.overrides)}" if replay.instead else "")
        + (f"; {left} tokens with smaller gradients are left out" if left else ""),
        markup=False,
        highlight=False,
    )
    table = Table("", "token", box=SIMPLE, padding=(0, 1, 0, 0))
    for mark in ("", "′")[: len(each)]:
        for name in SIGNALS:
            table.add_column({"advantage": "A"}.get(name, name) + mark, justify="right", no_wrap=True)
    for place in places:
        values = [tokens[entry.meta.rollout_id][place] for tokens in each.values()]
        cells = ["–" if math.isnan(value) else f"{value:+.3f}" for row in values for value in row]
        table.add_row(str(place + 1), repr(tokenizer.decode([ids[place]]))[1:-1], *cells)
    console.print(table, markup=False)


def _chosen(replay: Replay, rollout_id: str | None) -> Entry:
    there = {entry.meta.rollout_id: entry for entry in replay.entries}
    if rollout_id is None:
        of = {name: float(np.nansum(values[:, SIGNALS.index("size")])) for name, values in replay.again.tokens.items()}
        rollout_id = max(there, key=lambda name: (there[name].meta.source == "student", of[name]))
    return there[rollout_id]
