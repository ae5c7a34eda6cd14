"""A row for each answer to a held-out problem: what the scores are made of, kept so that checkpoints can be compared.

A run keeps them as evaluations/step-N/SET.parquet. Two checkpoints that answered the same problems are compared by the
differences on each problem, whose mean scatters less than the two accuracies do: what makes a problem hard is hard for
both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.disk import whole, writing
from opd_ray.errors import InputError
from opd_ray.evaluation.scores import error_over_sets, mean_and_error, right_by_problem
from opd_ray.messages import PromptGroup, RolloutMeta

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("sample", pa.int32()),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("repetitive", pa.bool_(), nullable=False),
        pa.field("num_response_tokens", pa.int32(), nullable=False),
        pa.field("mean_logprob", pa.float64(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
    ]
)
"""``problem`` is a digest of prompt and answer, for an id may be a row number. ``sample`` counts a problem's sampled
answers from 0 on and is null for the answer at temperature 0; ``mean_logprob`` is over the response tokens, nats;
``worker`` is the actor that answered."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the sampled accuracies (avg@k) of two checkpoints on one set: mean over problems of the first's less the
    second's."""

    difference: float
    difference_se: float | None
    """Standard error of the mean of the problems' differences; None for a single problem."""
    num_problems: int
    """Those that both answered."""


def table(answers: Iterable[tuple[PromptGroup, int | None, RolloutMeta]]) -> pa.Table:
    """Of SCHEMA: group, number of the sample (None at temperature 0) and meta of every answer."""
    rows = [
        {
            "prompt_id": group.prompt_id,
            "problem": _digest(group),
            "sample": sample,
            "correct": meta.correct,
            "truncated": meta.truncated,
            "repetitive": meta.repetitive,
            "num_response_tokens": meta.num_response_tokens,
            "mean_logprob": meta.mean_behaviour_logprob,
            "worker": meta.worker,
        }
        for group, sample, meta in answers
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _digest(group: PromptGroup) -> str:
    text = json.dumps([group.row["prompt"], group.row["answer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def directory(run_dir: Path, step: int) -> Path:
    """Where a run keeps the verdicts on its student after ``step``."""
    return run_dir / "evaluations" / f"step-{step}"


def forget(run_dir: Path, step: int) -> None:
    """Deletes what a run keeps of steps after ``step``."""
    for path in (run_dir / "evaluations").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def write(into: Path, verdicts: Mapping[str, pa.Table]) -> None:
    """A file for each set. Raises Unwritable."""
    for name, rows in verdicts.items():
        target = into / f"{name}.parquet"
        with writing(target):
            into.mkdir(parents=True, exist_ok=True)
            with whole(target) as partial:
                pq.write_table(rows, partial)


def are_in(place: Path) -> bool:
    """Is this a directory that verdicts were written into?"""
    return any(place.glob("*.parquet"))


def read(place: Path) -> dict[str, pa.Table]:
    """The verdicts in a directory, by set. Raises InputError for a file that holds none."""
    found = {}
    for path in sorted(place.glob("*.parquet")):
        try:
            found[path.stem] = pq.read_table(path, columns=SCHEMA.names).cast(SCHEMA)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: holds no verdicts ({reason}); give an evaluations/step-N of a run") from None
    return found


def compare(
    ours: Mapping[str, pa.Table], theirs: Mapping[str, pa.Table], where: str = "the other"
) -> dict[str, Difference]:
    """By set that both answered. Raises InputError where there is none, or where they were asked other problems."""
    check_common(ours, theirs, where)
    return {name: _paired(name, ours[name], theirs[name], where) for name in ours if name in theirs}


def average(differences: Mapping[str, Difference]) -> Difference:
    """Over sets, at least one."""
    each = list(differences.values())
    mean = float(np.mean([found.difference for found in each]))
    error = error_over_sets([found.difference_se for found in each])
    return Difference(mean, error, sum(found.num_problems for found in each))


def check_common(ours: Iterable[str], theirs: Iterable[str], where: str) -> None:
    """Raises InputError where there is no set of the same name."""
    if not set(ours) & set(theirs):
        raise InputError(
            f"{where} has verdicts on {', '.join(theirs) or 'no set'}, but here it is {', '.join(ours) or 'no set'} "
            "that is answered: there is nothing to compare; evaluate both on the same sets"
        )


def _paired(name: str, ours: pa.Table, theirs: pa.Table, where: str) -> Difference:
    mine, its = ({row["prompt_id"]: row["problem"] for row in _asked(each)} for each in (ours, theirs))
    shared = [problem for problem in mine if problem in its]
    if other := [problem for problem in shared if mine[problem] != its[problem]] or (not shared and list(its)):
        raise InputError(
            f"{where}: its set {name} has other problems than were answered here, as {other[0]!r}; evaluate both on "
            "the same file"
        )
    right, theirs_right = right_by_problem(ours), right_by_problem(theirs)
    mean, error = mean_and_error([np.mean(right[each]) - np.mean(theirs_right[each]) for each in shared])
    return Difference(mean, error, len(shared))


def _asked(verdicts: pa.Table) -> list[dict[str, str]]:
    return verdicts.select(["prompt_id", "problem"]).to_pylist()
