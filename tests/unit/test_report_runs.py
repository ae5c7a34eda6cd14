"""What the report reads, counts and says, on made-up runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_ray.errors import InputError
from opd_ray.report.arms import MEASURES, clock, count, group, inflated_at, share
from opd_ray.report.runs import find_runs, read_run, read_runs
from opd_ray.report.verdict import judge
from report_runs import make_run

ROLLBACK = {
    "step": 12,
    "signal": "truncation_rate",
    "value": 0.6,
    "threshold": 0.5,
    "level": "rollback",
    "action": "back to step 10",
}


def arms_of(*runs: Path):
    return group([read_run(run) for run in runs])


def append(run: Path, line: dict) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def test_runs_are_found_among_and_below_what_is_given_once_each(tmp_path):
    first, second = make_run(tmp_path / "study" / "a"), make_run(tmp_path / "study" / "deep" / "b")
    assert find_runs([tmp_path / "study"]) == [first, second]
    assert find_runs([second, tmp_path / "study"]) == [second, first]


@pytest.mark.parametrize(
    ("name", "words"), [("nothing", "no such directory"), ("file", "is not a directory"), ("", "no m")]
)
def test_what_is_no_run_is_refused(tmp_path, name, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=words):
        find_runs([tmp_path / name])


def test_a_run_without_measurements_is_refused_alone_and_left_out_of_a_study(tmp_path):
    run = tmp_path / "empty"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no measurements yet"):
        read_runs([run])
    make_run(tmp_path / "good")
    runs, left_out = read_runs([tmp_path])
    assert [run.path.name for run in runs] == ["good"]
    assert len(left_out) == 1 and "empty" in left_out[0]


def test_the_last_line_of_a_repeated_step_wins_and_evaluations_join_their_step(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    append(run, {"step": 2, "rollouts/length": 33.0})  # rolled back
    found = read_run(run).metrics
    assert found["rollouts/length"] == {1: 20.0, 2: 33.0, 3: 20.0}
    assert found["rollouts/accuracy"][2] == pytest.approx(0.3 + 0.2 * 2 / 3)
    assert list(found["evaluation/accuracy_sampled"]) == [0, 3]


def test_a_line_cut_off_by_a_crash_is_left_out_and_counted_once_the_run_went_on(tmp_path):
    run = make_run(tmp_path / "run", steps=3, finished=False)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "rollouts/le')
    assert (read_run(run).steps, read_run(run).damaged_lines) == (3, 0)
    append(run, {"step": 4, "rollouts/length": 1.0})  # on the same line
    append(run, {"step": 5, "rollouts/length": 1.0})
    assert (read_run(run).steps, read_run(run).damaged_lines) == (5, 1)
    assert any("damaged" in caveat for caveat in judge(arms_of(run)).caveats)


def test_an_unfinished_run_says_what_it_has(tmp_path):
    run = read_run(make_run(tmp_path / "run", finished=False, name="mine", steps=7, config={"learner": {"steps": 50}}))
    assert (run.finished, run.arm, run.seed, run.steps, run.planned_steps) == (False, "mine", 1, 7, 50)
    assert run.evaluation("before")["accuracy_sampled"] == 0.3
    assert run.evaluation("after") == {}


def test_arms_are_named_by_name_then_method_then_directory(tmp_path):
    named = make_run(tmp_path / "a", name="opd, lag 2")
    method = make_run(tmp_path / "b", method="stableopd")
    bare = make_run(tmp_path / "c", finished=False, config={"unknown": 1})
    assert {read_run(run).arm for run in (named, method, bare)} == {"opd, lag 2", "stableopd", "c"}


def test_the_table_has_mean_spread_and_every_seed(tmp_path):
    runs = [make_run(tmp_path / f"{seed}", seed=seed, accuracy=(0.3, last)) for seed, last in ((2, 0.5), (1, 0.7))]
    (arm,) = arms_of(*runs)
    cells = [measure.cell(arm) for measure in MEASURES]
    assert cells[1] == (".60 ± .14", "[.70 .50]")  # by seed
    assert cells[7] == ("never", "[– –]")
    single = arms_of(runs[0])[0]
    assert MEASURES[1].cell(single) == (".50", "")


def test_arms_are_ordered_by_what_they_reached(tmp_path):
    low, high = make_run(tmp_path / "a", name="low"), make_run(tmp_path / "b", name="high", accuracy=(0.3, 0.9))
    unfinished = make_run(tmp_path / "c", name="a", finished=False)
    assert [arm.label for arm in arms_of(low, unfinished, high)] == ["high", "low", "a"]


def test_the_verdict_counts_inflation_over_seeds(tmp_path):
    good = [make_run(tmp_path / f"s{n}", method="stableopd", seed=n, accuracy=(0.3, 0.9)) for n in (1, 2)]
    bad = [make_run(tmp_path / f"o{n}", seed=n, inflates_at=10 + n, accuracy=(0.3, 0.1)) for n in (1, 2)]
    verdict = judge(arms_of(*good, *bad))
    assert verdict.headline == (
        "StableOPD rose from .30 to .90 ± .00 held-out sampled accuracy (2 seeds); "
        "it never truncated more than .02 of a step's rollouts."
    )
    assert verdict.others == (
        (
            "opd",
            "Plain OPD fell from .30 to .10 ± .00 held-out sampled accuracy, .80 behind StableOPD (2 of 2 seeds); "
            "it inflated in 2 of 2 seeds (more than half truncated from step 11–12).",
        ),
    )


def test_the_verdict_claims_no_lead_that_the_spread_allows_for(tmp_path):
    first = [make_run(tmp_path / f"a{n}", name="a", seed=n, accuracy=(0.3, last)) for n, last in ((1, 0.9), (2, 0.5))]
    other = [make_run(tmp_path / f"b{n}", name="b", seed=n, accuracy=(0.3, last)) for n, last in ((1, 0.5), (2, 0.7))]
    ((_, sentence),) = judge(arms_of(*first, *other)).others
    assert ".10 behind a (1 of 2 seeds, which the spread allows for)" in sentence


def test_the_verdict_tells_recovery_the_guard_and_what_is_missing(tmp_path):
    run = make_run(tmp_path / "run", inflates_at=9, events=[{**ROLLBACK, "level": "warn"}, ROLLBACK])
    summary = json.loads((run / "summary.json").read_text())
    summary["eval_after"]["truncation_rate"] = 0.1
    (run / "summary.json").write_text(json.dumps(summary))
    unfinished = make_run(tmp_path / "other", name="other", finished=False, config={"learner": {"steps": 50}})
    verdict = judge(arms_of(run, unfinished))
    assert "(more than half truncated from step 9; it came back under half by the end)" in verdict.headline
    assert "the guard acted once, at step 12" in verdict.headline
    assert "other has no final evaluation, training accuracy" in verdict.others[0][1]
    assert verdict.caveats[0] == "Unfinished: other (step 20 of 50)."
    assert any(caveat.startswith("One seed an arm") for caveat in verdict.caveats)


def test_an_arm_of_runs_that_differ_in_more_than_their_seed_is_called_out(tmp_path):
    runs = [make_run(tmp_path / f"{n}", seed=n, config={"learner": {"steps": 20, "lr": n}}) for n in (1, 2)]
    assert "Runs of Plain OPD differ in more than their seed: learner.lr." in judge(arms_of(*runs)).caveats


def test_half_is_not_more_than_half(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    append(run, {"step": 4, "rollouts/truncation_rate": 0.5})
    assert inflated_at(read_run(run)) is None
    append(run, {"step": 5, "rollouts/truncation_rate": 0.51})
    assert inflated_at(read_run(run)) == 5


def test_numbers_as_people_write_them():
    assert [share(value) for value in (0.934, 1.0, 0.0, -0.05)] == [".93", "1.00", ".00", "-.05"]
    assert [count(value) for value in (950, 42_123, 3_400_000)] == ["950", "42.1 k", "3.4 M"]
    assert [clock(value) for value in (41, 185, 7385)] == ["41 s", "3:05", "2:03:05"]
