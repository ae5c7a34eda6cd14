"""What the report reads, counts and says, on made-up runs."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from made_up_runs import make_run
from opd_ray.errors import InputError
from opd_ray.report.arms import MEASURES, Cell, clock, count, group, highest_truncation, inflated_at, share
from opd_ray.report.runs import find_runs, read_run, read_runs, study_order
from opd_ray.report.verdict import judge

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


def test_evaluations_join_their_step_and_are_no_step_back(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    append(run, {"step": 2, "evaluation/accuracy_sampled": 0.4})  # a slow one
    append(run, {"step": 4, "rollouts/length": 20.0})
    found = read_run(run)
    assert found.metrics["evaluation/accuracy_sampled"] == {0: 0.3, 2: 0.4, 3: 0.5}
    assert found.abandoned == ()


def test_a_repeated_step_ends_an_attempt_and_what_follows_takes_the_place_of_all_of_it(tmp_path):
    run = make_run(tmp_path / "run", steps=6, inflates_at=5, events=[{**ROLLBACK, "step": 6}])
    for step in (4, 5):
        append(run, {"step": step, "rollouts/truncation_rate": 0.1})
    append(run, {"step": 5, "rollouts/truncation_rate": 0.2})  # cut off and resumed
    found = read_run(run)
    assert found.metrics["rollouts/truncation_rate"] == {1: 0.02, 2: 0.02, 3: 0.02, 4: 0.1, 5: 0.2}
    assert [(each.first, each.last, each.rolled_back) for each in found.abandoned] == [(4, 6, True), (5, 5, False)]
    first, second = (each.metrics["rollouts/truncation_rate"] for each in found.abandoned)
    assert list(first.values()) == [0.02] * 4 + [0.9] * 2 and list(second.values()) == [0.02] * 3 + [0.1] * 2
    assert found.steps == 5
    assert (inflated_at(found), highest_truncation(found)) == (5, 0.9)  # what was abandoned did happen
    assert "Plain OPD" not in judge(arms_of(run)).caveats[0]
    assert "opd, seed 1 (rolled back at step 6, to 3, cut off at step 5, to 4)" in judge(arms_of(run)).caveats[0]


def test_an_arm_that_shares_the_first_evaluation_has_it_from_its_summary(tmp_path):
    run = make_run(tmp_path / "run", steps=3, evaluates_before=False)
    summary = json.loads((run / "summary.json").read_text())
    summary["eval_before"]["teacher"] = {"advantage": -0.7, "eos_teacher_end": None}
    (run / "summary.json").write_text(json.dumps(summary))
    metrics = read_run(run).metrics
    assert metrics["evaluation/accuracy_sampled"] == {0: 0.3, 3: 0.5}
    assert metrics["evaluation/advantage"] == {0: -0.7}
    assert list(metrics["evaluation/accuracy_sampled"]) == [0, 3] and 0 not in metrics["rollouts/length"]


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
    assert cells[1] == Cell(".60 ± .10", (".70", ".50"), pytest.approx(0.6))  # by seed
    assert cells[9] == Cell("never", (), None)
    assert cells[0].text == ".30 ± .00" and cells[0].each == ()  # the same for each
    single = arms_of(runs[0])[0]
    assert MEASURES[1].cell(single) == Cell(".50", (), 0.5)


def test_what_an_accuracy_costs_is_counted_up_to_the_first_evaluation_that_has_it(tmp_path):
    runs = []
    for seed, accuracies in ((1, (0.5, 0.59, 0.65, 0.9)), (2, (0.5, 0.5, 0.5, 0.5))):
        runs.append(make_run(tmp_path / f"{seed}", seed=seed, steps=0, finished=False, name="mine"))
        for step, accuracy in enumerate(accuracies, 1):
            append(runs[-1], {"step": step, "rollouts/tokens": 100.0 * step, "throughput/step_s": 2.0})
            append(runs[-1], {"step": step, "evaluation/accuracy_sampled": accuracy})
    cells = {measure.title: measure.cell(arms_of(*runs)[0]) for measure in MEASURES}
    assert cells["generated tokens to .6"] == Cell("1 of 2: 600", ("600", "–"), 600.0)
    assert cells["time to .6"].each == ("6 s", "–")


def test_arms_are_ordered_by_what_they_reached(tmp_path):
    low, high = make_run(tmp_path / "a", name="low"), make_run(tmp_path / "b", name="high", accuracy=(0.3, 0.9))
    unfinished = make_run(tmp_path / "c", name="a", finished=False)
    assert [arm.label for arm in arms_of(low, unfinished, high)] == ["high", "low", "a"]


def test_arms_are_listed_in_the_order_that_is_given_and_others_behind(tmp_path):
    reached = {"a": 0.0, "b": 0.4, "c": 0.9}
    runs = [read_run(make_run(tmp_path / name, name=name, accuracy=(0.3, at))) for name, at in reached.items()]
    assert [arm.label for arm in group(runs, ["b", "nobody", "a", "b"])] == ["b", "a", "c"]


def test_a_study_says_its_order_in_results_json(tmp_path):
    assert study_order([tmp_path]) == ()
    (tmp_path / "results.json").write_text(json.dumps({"arms": [{"arm": "z"}, {"arm": "a"}], "claims": []}))
    assert study_order([tmp_path / "elsewhere", tmp_path]) == ("z", "a")
    (tmp_path / "results.json").write_text('{"not": "a study"}')
    assert study_order([tmp_path]) == ()


def test_the_verdict_counts_inflation_over_seeds(tmp_path):
    good = [make_run(tmp_path / f"s{n}", method="stableopd", seed=n, accuracy=(0.3, 0.9)) for n in (1, 2)]
    bad = [make_run(tmp_path / f"o{n}", seed=n, inflates_at=10 + n, accuracy=(0.3, 0.1)) for n in (1, 2)]
    verdict = judge(arms_of(*good, *bad))
    assert verdict.headline == (
        "StableOPD rose from .30 to .90 ± .00 held-out sampled accuracy (2 seeds); "
        "it never truncated more than .02 of a step's rollouts."
    )
    assert verdict.about == "stableopd"
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
    assert ".10 behind a (1 of 2 seeds, within two standard errors)" in sentence


def study_of(tmp_path: Path, *inflated: str) -> list[Path]:
    """Seven arms of two seeds, "a" the most accurate and "b" level with it."""
    runs = []
    for place, name in enumerate(["g, far", *"fedcba"]):
        for seed in (1, 2):
            end = {"a": 0.9, "b": 0.89}.get(name, 0.2 + 0.1 * place)
            at = 10 if name in inflated and (seed == 1 or name == inflated[0]) else None
            path = tmp_path / f"{name[0]}{seed}"
            runs.append(make_run(path, name=name, seed=seed, accuracy=(0.3, end), inflates_at=at))
    return runs


def test_of_many_arms_the_headline_says_who_ended_highest_and_who_inflated(tmp_path):
    verdict = judge(arms_of(*study_of(tmp_path, "g, far", "d")))
    assert verdict.headline == (
        "a ended highest, at .90 ± .00 held-out sampled accuracy (2 seeds), level with b; "
        "“g, far” in 2 of 2 seeds and d in 1 of 2 seeds inflated, past half truncated."
    )
    assert verdict.about is None
    assert len(verdict.others) == 7 and dict(verdict.others)["a"].startswith("a rose from .30 to .90")
    assert "behind a" in dict(verdict.others)["d"]


def test_of_many_calm_arms_none_is_said_to_have_inflated(tmp_path):
    verdict = judge(arms_of(*study_of(tmp_path)))
    assert verdict.headline.endswith("; no arm truncated more than half of a step's rollouts.")


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


@pytest.mark.slow
def test_a_long_run_is_read_in_little_memory_with_its_ends_and_extremes(tmp_path):
    """The bug: the whole file lay in memory, as text and as numbers: gigabytes of a run of 100 000 steps."""
    run, steps = tmp_path / "run", 30_000
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as lines:
        for step in range(1, steps + 1):
            values = {f"learner/metric_{i}": step / steps for i in range(4)} | {"learner/loss": float(step % 2)}
            values |= {"rollouts/truncation_rate": {12_345: 0.75, 23_457: 0.001}.get(step, 0.25)}
            lines.write(json.dumps({"step": step} | values) + "\n")
            if step % 10_000 == 0:
                lines.write(json.dumps({"step": step, "evaluation/accuracy_sampled": step / steps}) + "\n")
        lines.write('{"step": 30')
    tracemalloc.start()
    found = read_run(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6, "bytes; the file has 5.5e6, and its numbers would be 26e6"
    assert highest_truncation(found) == 0.75
    truncation, trend = found.metrics["rollouts/truncation_rate"], found.metrics["learner/metric_0"]
    assert min(truncation, key=truncation.get) == 23_457 and max(truncation, key=truncation.get) == 12_345
    assert list(trend)[0] == 1 and list(trend)[-10:] == list(range(steps - 9, steps + 1))
    assert 1000 < len(trend) < 4200 and list(trend) == sorted(trend)
    assert sum(trend.values()) / len(trend) == pytest.approx(0.5, abs=0.01)
    assert list(found.metrics["evaluation/accuracy_sampled"]) == [10_000, 20_000, 30_000]
    assert (found.steps, found.damaged_lines, found.abandoned) == (steps, 0, ())


def test_a_long_run_that_goes_back_keeps_what_was_before(tmp_path):
    run, steps = make_run(tmp_path / "run", steps=1), 10_000
    for first, last, value in ((2, steps, 0.25), (6_000, 7_000, 0.5)):
        with (run / "metrics.jsonl").open("a") as lines:
            for step in range(first, last + 1):
                lines.write(json.dumps({"step": step, "learner/loss": value}) + "\n")
    found = read_run(run)
    loss = found.metrics["learner/loss"]
    assert (min(loss), max(loss)) == (1, 7_000)
    assert {value for step, value in loss.items() if 2 <= step < 6_000} == {0.25}
    assert {value for step, value in loss.items() if step >= 6_000} == {0.5}
    assert [(each.first, each.last) for each in found.abandoned] == [(6_000, steps)]
    assert max(found.abandoned[0].metrics["learner/loss"]) == steps
