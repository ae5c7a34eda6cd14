"""Sets of held-out problems before and after training: accuracies with their standard errors, and the difference.

The difference is paired: it is taken on each problem, of the verdicts that the run has kept
(:mod:`opd_ray.evaluation.verdicts`). Where they are gone, or were made by another run, it has no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.config import HELD_OUT
from opd_ray.errors import InputError
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import with_error
from opd_ray.report.arms import Arm
from opd_ray.report.runs import Run

AVERAGE = "average"


@dataclass(frozen=True)
class Row:
    """One set of one run, as text; "–" for what was not measured."""

    arm: Arm
    run: Run
    name: str
    problems: str
    measure: str
    """What is averaged over problems, as avg@32."""
    before: str
    after: str
    difference: str
    passed: str
    """pass@k before and after."""
    truncated: str
    """After."""
    length: str
    """After, mean tokens."""


def rows(arms: Sequence[Arm]) -> list[Row]:
    """A row for each set of each run, and one for the average of several. A set without a name is in the table of arms;
    it has a row where there is but one run."""
    runs = [(arm, run) for arm in arms for run in arm.runs]
    return [row for arm, run in runs for row in _of_run(arm, run, alone=len(runs) == 1)]


def _of_run(arm: Arm, run: Run, alone: bool) -> list[Row]:
    before, after = run.evaluation("before"), run.evaluation("after")
    names = [name for name in _sets(after) | _sets(before) if alone or name != HELD_OUT]
    differences = _differences(run)
    found = [
        _row(arm, run, name, _sets(before).get(name, {}), _sets(after).get(name, {}), differences.get(name))
        for name in names
    ]
    if len(found) > 1:
        whole = verdicts.average(differences) if all(name in differences for name in names) else None
        found.append(_row(arm, run, AVERAGE, before, after, whole))
    return found


def _sets(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return evaluation.get("sets") or {}


def _differences(run: Run) -> dict[str, verdicts.Difference]:
    """Of the last evaluation to the first, by set."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run.path / "evaluations").glob("step-*"))
    if not run.evaluation("after") or steps[:1] != [0] or len(steps) < 2:
        return {}
    first, last = (verdicts.directory(run.path, step) for step in (steps[0], steps[-1]))
    try:
        return verdicts.compare(verdicts.read(last), verdicts.read(first))
    except InputError:
        return {}  # damaged, or of other problems: the accuracies stand in the summary all the same


def _row(
    arm: Arm,
    run: Run,
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    difference: verdicts.Difference | None,
) -> Row:
    known = after or before
    samples = known.get("samples")
    return Row(
        arm=arm,
        run=run,
        name=name,
        problems=f"{known.get('num_problems', '–')}",
        measure=f"avg@{samples}" if samples else "mean over sets",
        before=_accuracy(before),
        after=_accuracy(after),
        difference=_difference(before, after, difference),
        passed=" → ".join(_passed(each) for each in (before, after)) if samples and samples > 1 else "–",
        truncated=_shown(after.get("truncation_rate")),
        length=_shown(after.get("mean_length"), form=".1f"),
    )


def _accuracy(evaluation: Mapping[str, Any]) -> str:
    return _shown(evaluation.get("accuracy_sampled"), evaluation.get("accuracy_sampled_se"))


def _passed(evaluation: Mapping[str, Any]) -> str:
    k = str(evaluation.get("samples"))
    return _shown((evaluation.get("pass_at") or {}).get(k), (evaluation.get("pass_at_se") or {}).get(k))


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], found: verdicts.Difference | None) -> str:
    values = [each.get("accuracy_sampled") for each in (before, after)]
    if found is None and None not in values:
        found = verdicts.Difference(values[1] - values[0], None, 0)
    return "–" if found is None else with_error(found.difference, found.difference_se, "+.3f").replace("-", "−")


def _shown(value: float | None, error: float | None = None, form: str = ".3f") -> str:
    return "–" if value is None else with_error(value, error, form)
