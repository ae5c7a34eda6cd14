"""What runs answered to each held-out problem, of the verdicts that they keep (:mod:`opd_ray.evaluation.verdicts`).

They make errors over problems, differences problem by problem, and accuracies of different steps comparable: an
evaluation during a run asks fewer problems than the last one does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opd_ray.errors import InputError
from opd_ray.evaluation import verdicts
from opd_ray.report.runs import Run

Kind = Literal["sampled", "greedy", "truncated"]
"""Share of the sampled answers that are right, whether the greedy one is, share of the sampled ones cut off."""

Answers = tuple[tuple[str, ...], np.ndarray]
"""Problems, and a number for each."""


def last(run: Run, kind: Kind) -> Answers | None:
    """After the last step that was evaluated; None where nothing is kept of it."""
    steps = _steps(run)
    return _answers(run, steps[-1], kind) if steps and run.evaluation("after") else None


def aligned(runs: Sequence[Run], kind: Kind) -> np.ndarray | None:
    """[runs, problems] after the last step; None where one has none, or others."""
    found = [last(run, kind) for run in runs]
    if not found or None in found or len({problems for problems, _ in found}) > 1:
        return None
    return np.stack([values for _, values in found])


def best_step(run: Run) -> tuple[int, float] | None:
    """The step whose evaluation has the highest sampled accuracy, the earliest of equals; and by how much it is above
    the last, both on the problems that all of the run's evaluations asked. None with fewer than two evaluations, or
    without the last."""
    steps = [step for step in _steps(run) if step > 0]
    each = {step: found for step in steps if (found := _answers(run, step, "sampled")) is not None}
    if len(each) < 2 or steps[-1] not in each or not run.evaluation("after"):
        return None
    common = set.intersection(*(set(problems) for problems, _ in each.values()))
    if not common:
        return None
    accuracies = {
        step: float(np.mean([value for problem, value in zip(problems, values, strict=True) if problem in common]))
        for step, (problems, values) in each.items()
    }
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    return best, accuracies[best] - accuracies[steps[-1]]


def _steps(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run.path / "evaluations").glob("step-*"))


def _answers(run: Run, step: int, kind: Kind) -> Answers | None:
    """Of all sets of one evaluation."""
    directory = verdicts.directory(run.path, step)
    try:
        stamp = max((path.stat().st_mtime_ns for path in directory.glob("*.parquet")), default=0)
        return _read(directory, stamp).get(kind) if stamp else None
    except (InputError, OSError):
        return None  # damaged: the means stand in the summary all the same


@functools.lru_cache(maxsize=8192)
def _read(directory: Path, _stamp: int) -> dict[Kind, Answers]:
    tables = [
        table.set_column(0, "prompt_id", pc.binary_join_element_wise(name, table["prompt_id"], "/"))
        for name, table in verdicts.read(directory).items()
    ]
    rows = pa.concat_tables(tables)
    sampled, greedy = rows.filter(pc.is_valid(rows["sample"])), rows.filter(pc.is_null(rows["sample"]))
    found = {
        "sampled": _by_problem(sampled, "correct"),
        "greedy": _by_problem(greedy, "correct"),
        "truncated": _by_problem(sampled, "truncated"),
    }
    return {kind: answers for kind, answers in found.items() if answers[0]}


def _by_problem(rows: pa.Table, name: str) -> Answers:
    """The mean over a problem's answers."""
    table = rows.select(["prompt_id", "problem"]).append_column("value", pc.cast(rows[name], pa.float32()))
    means = table.group_by(["prompt_id", "problem"]).aggregate([("value", "mean")]).sort_by("prompt_id")
    # An id may be a row number: the digest says whether it is the same problem.
    problems = pc.binary_join_element_wise(means["prompt_id"], means["problem"], " ").to_pylist()
    return _interned(tuple(problems)), means["value_mean"].to_numpy()


@functools.lru_cache(maxsize=64)
def _interned(problems: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for all evaluations of the same problems."""
    return problems
