"""An evaluation as tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from opd_ray.config import HELD_OUT
from opd_ray.evaluation.scores import Evaluation, SetScores, with_error
from opd_ray.evaluation.verdicts import Difference, average

_WIDTH = 160
"""Columns where the output is no terminal."""


def show(title: str, found: Evaluation, differences: Mapping[str, Difference], against: str = "") -> None:
    """Prints the scores over all sets, and those of each set where it has a name or is compared with ``against``."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(_overall(found))
    if differences or HELD_OUT not in found.sets:
        console.print(_sets(found, differences))
    if differences:
        console.print(f"difference: to {against}, paired by problem", markup=False, highlight=False, soft_wrap=True)


def _overall(found: Evaluation) -> Table:
    table = Table(show_header=False)
    for name, value in found.saved().items():
        if name != "sets" and value is not None:
            table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table


def _sets(found: Evaluation, differences: Mapping[str, Difference]) -> Table:
    table = Table("set")
    for column in ("problems", "sampled accuracy", "pass@k", "greedy", "truncated", "length"):
        table.add_column(column, justify="right")
    if differences:
        table.add_column("difference", justify="right")
    for name, scores in found.sets.items():
        table.add_row(
            name,
            str(scores.num_problems),
            f"avg@{scores.samples} {with_error(scores.accuracy_sampled, scores.accuracy_sampled_se)}",
            _passed(scores),
            "" if scores.accuracy_greedy is None else f"{scores.accuracy_greedy:.3f}",
            f"{scores.truncation_rate:.3f}",
            f"{scores.mean_length:.1f}",
            *([_difference(differences[name])] if name in differences else []),
        )
    if len(found.sets) > 1:
        accuracy = with_error(found.accuracy_sampled, found.accuracy_sampled_se)
        whole = [_difference(average(differences))] if found.sets.keys() == differences.keys() else []
        table.add_row("average", str(found.num_problems), accuracy, "", "", "", "", *whole)
    return table


def _difference(found: Difference) -> str:
    return with_error(found.difference, found.difference_se, "+.3f")


def _passed(scores: SetScores) -> str:
    k = str(scores.samples)
    return f"pass@{k} {with_error(scores.pass_at[k], scores.pass_at_se[k])}" if scores.samples > 1 else ""
