"""Held-out sets in the report: a curve for each, and what they were before and after."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pyarrow as pa

from made_up_pages import panels, report
from made_up_runs import make_run
from made_up_verdicts import drawn, evaluation, rows
from opd_ray.evaluation import verdicts
from opd_ray.report.arms import group
from opd_ray.report.runs import read_run
from opd_ray.report.sets import rows as table

BEFORE = {"aime": rows(drawn(0)), "math": rows(drawn(1, 40, 1))}
AFTER = {"aime": rows({name: [True, *right[1:]] for name, right in drawn(0).items()}), "math": rows(drawn(2, 40, 1))}


def evaluated(path: Path, before: dict[str, pa.Table] = BEFORE, after: dict[str, pa.Table] = AFTER) -> Path:
    """A run of 20 steps with these verdicts before and after."""
    run = make_run(path)
    summary, lines = json.loads((run / "summary.json").read_text()), []
    for when, step, kept in (("before", 0, before), ("after", 20, after)):
        found = evaluation(**kept)
        summary[f"eval_{when}"] = found.saved()
        lines.append({"step": step} | found.metrics())
        verdicts.write(verdicts.directory(run, step), kept)
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(json.dumps(line) + "\n" for line in lines)
    return run


def cells(path: Path) -> list[tuple[str, ...]]:
    found = table(group([read_run(path)]))
    return [(row.name, row.measure, row.before, row.after, row.difference, row.passed) for row in found]


def test_the_table_has_each_set_before_and_after_with_standard_errors(tmp_path):
    run = evaluated(tmp_path / "run")
    aime, math500, average = cells(run)
    shares = [sum(right) / 4 for right in drawn(0).values()]
    error = statistics.stdev(shares) / math.sqrt(30)
    assert aime[:3] == ("aime", "avg@4", f"{statistics.fmean(shares):.3f} ± {error:.3f}")
    gained = [0.0 if right[0] else 0.25 for right in drawn(0).values()]
    paired = statistics.stdev(gained) / math.sqrt(30)
    assert aime[4] == f"+{statistics.fmean(gained):.3f} ± {paired:.3f}"
    assert aime[5].count(" → ") == 1 and aime[5].endswith("1.000 ± 0.000")
    assert (math500[1], math500[5]) == ("avg@1", "–")
    found = evaluation(**AFTER)
    assert average[:2] == ("average", "mean over sets")
    assert average[3] == f"{found.accuracy_sampled:.3f} ± {found.accuracy_sampled_se:.3f}"
    paired = verdicts.compare(AFTER, BEFORE)
    error = math.hypot(*(each.difference_se for each in paired.values())) / 2
    assert average[4] == f"{found.accuracy_sampled - evaluation(**BEFORE).accuracy_sampled:+.3f} ± {error:.3f}"
    page, data = report(run)
    assert aime[4] in page and 'id="sets"' in page
    charts = {panel["title"]: panel for panel in panels(data).values()}
    assert charts["Evaluation aime accuracy sampled"]["series"][0]["runs"][0][0] == [0, 20]
    assert {"Evaluation aime pass at 4", "Evaluation math accuracy sampled"} <= charts.keys()


def test_without_its_verdicts_a_difference_has_no_error(tmp_path):
    run = evaluated(tmp_path / "run")
    paired = cells(run)[0][4]
    for path in verdicts.directory(run, 0).iterdir():
        path.write_bytes(b"PAR1")
    assert cells(run)[0][4] == paired.partition(" ±")[0]
    other = evaluated(tmp_path / "other", before={"aime": rows(drawn(0), text="another"), "math": BEFORE["math"]})
    assert "±" not in cells(other)[0][4], "the difference to other problems is none"


def test_a_set_without_a_name_is_shown_of_a_single_run_alone(tmp_path):
    held_out = {"held_out": rows(drawn(0))}
    runs = [evaluated(tmp_path / name, held_out, held_out) for name in "ab"]
    assert [row[0] for row in cells(runs[0])] == ["held_out"]
    assert table(group([read_run(run) for run in runs])) == []
    assert 'id="sets"' not in report(make_run(tmp_path / "plain"))[0]


def test_the_first_evaluation_of_a_set_is_on_its_curve_where_another_arm_made_it(tmp_path):
    run = evaluated(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] > 0]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    curves = read_run(run).metrics
    for name in ("accuracy_sampled", "pass_at_4", "truncation_rate"):
        assert list(curves[f"evaluation/aime/{name}"]) == [0, 20]
    assert "evaluation/aime/samples" not in curves
