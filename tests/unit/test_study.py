"""Studies: which arms and runs there are, what is left to do, and the table."""

import json
import re
from pathlib import Path

import pytest

from opd_ray.errors import InputError
from opd_ray.report.arms import TRUNCATION, Arm, inflated_at, markdown, results
from opd_ray.report.runs import Run
from opd_ray.study.claims import judge
from opd_ray.study.study import read_study, run_study, shared_rooms

STUDY = """
common: {learner: {steps: 7}}
arms:
  StableOPD: {}
  "OPD, full": {loss: {student: {coef: 1}, golden: {coef: 0}, reference: {coef: 0}}, buffer: {golden_per_prompt: 0}}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_an_arm_is_the_common_settings_and_its_own_and_overrides_win(study):
    stable, opd = read_study(study, ["learner.steps=3", "rollout.engine=torch"]).arms
    assert (stable.config(4).method, opd.config(4).method) == ("stableopd", "opd")
    assert (opd.config(4).seed, opd.config(4).name, opd.config(4).learner.steps) == (4, "OPD, full", 3)
    assert stable.config(0).rollout.engine == "torch"
    assert opd.directory == "opd-full"


def test_an_arm_may_run_on_the_first_seeds_only(tmp_path):
    wide, narrow = arms_of(tmp_path, "arms: {a: {}, b: {seeds: 2}}")
    assert (wide.seeds([3, 5, 7]), narrow.seeds([3, 5, 7])) == ([3, 5, 7], [3, 5])
    with pytest.raises(InputError, match="arm 'b': seeds is 0, expected how many"):
        arms_of(tmp_path, "arms: {a: {}, b: {seeds: 0}}")


def test_arms_are_picked_by_name_or_directory(study):
    assert [arm.name for arm in read_study(study, only=["opd-full"]).arms] == ["OPD, full"]
    with pytest.raises(InputError, match="no arm 'opd'; it has stableopd, opd-full"):
        read_study(study, only=["opd"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {loss: {golden: {coef: 0}}}}", "arm 'a': config: golden rollouts are made"),
        ("arms: {a: {los: {}}}", "arm 'a': config: unknown field 'los'"),
        ("common: {}", "expected 'arms', a mapping"),
        ("arms: {a: {}}\nseeds: 3", "expected 'arms', a mapping"),
        ("arms: [", "study"),
    ],
)
def test_a_bad_study_is_refused_in_one_line_before_anything_starts(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


def arms_of(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return read_study(path).arms


def test_the_rooms_are_those_of_the_arm_that_needs_all_of_them(study, tmp_path):
    stable, opd = read_study(study).arms
    assert shared_rooms([opd, stable], 3) == stable.config(3)
    seq = """{buffer: {golden_per_prompt: 0, teacher_per_prompt: 1}, rollout: {responses_per_prompt: 0},
              loss: {student: {coef: 0}, golden: {coef: 0}, teacher: {coef: 1}, reference: {coef: 0}}}"""
    with pytest.raises(InputError, match="no single arm needs all of them"):
        shared_rooms(arms_of(tmp_path, f"arms: {{stable: {{}}, kd: {seq}}}"), 0)


def test_arms_that_would_need_other_engines_are_refused(tmp_path):
    arms = arms_of(tmp_path, "arms: {a: {}, b: {rollout: {max_num_seqs: 8}}}")
    with pytest.raises(InputError, match="rollout.max_num_seqs is 8 in arm 'b' and 64 in 'a'"):
        shared_rooms(arms, 0)


def finish(directory, arm, seed, sampled, most_truncated=0.0):
    run_dir = arm.run_directory(directory, seed)
    run_dir.mkdir(parents=True)
    after = {"accuracy_sampled": sampled, "accuracy_greedy": 1.0, "truncation_rate": 0.0}
    summary = {
        "eval_before": after,
        "eval_after": after,
        "max_truncation_rate": most_truncated,
        "trained_tokens": 2000,
        "wall_s": 3.0,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))


def test_a_finished_study_has_nothing_left_to_do_and_starts_nothing(study, tmp_path):
    arms, said = read_study(study).arms, []
    for arm in arms:
        finish(tmp_path, arm, 0, 0.5)
    run_study(arms, [0], tmp_path, said.append)
    assert said == ["2 arms on 1 seeds: 2 runs are done, 0 to go"]


def test_a_run_that_a_signal_stopped_is_not_finished(study, tmp_path):
    """It has left a summary, which is of no use to a study: it runs again."""
    arm, _ = read_study(study).arms
    finish(tmp_path, arm, 0, 0.5)
    path = arm.run_directory(tmp_path, 0) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stopped_by": "signal"}))
    assert arm.summary(tmp_path, 0) is None


def test_a_finished_run_with_other_settings_is_refused(study, tmp_path):
    arm, _ = read_study(study).arms
    finish(tmp_path, arm, 0, 0.5)
    (arm.run_directory(tmp_path, 0) / "arm.json").write_text(json.dumps({"learner": {"steps": 8}}))
    with pytest.raises(InputError, match="was made with other settings of arm 'StableOPD'"):
        run_study([arm], [0], tmp_path, print)


def arm(label, sampled, most_truncated=(0.0, 0.0, 0.0)):
    """An arm of finished runs, seeds from 0 on."""
    runs = []
    for seed, (accuracy, rate) in enumerate(zip(sampled, most_truncated, strict=True)):
        after = {"accuracy_sampled": accuracy, "accuracy_greedy": 1.0, "truncation_rate": 0.0}
        summary = {"eval_after": after, "trained_tokens": 2000}
        runs.append(Run(Path(f"{label}-{seed}"), label, seed, {}, summary, {TRUNCATION: {1: 0.0, 2: rate}}))
    return Arm(label, tuple(runs))


def test_the_table_has_mean_deviation_and_every_seed():
    names = ("sampled accuracy after", "truncated after", "trained tokens")
    line = markdown([arm("StableOPD", (0.8, 0.9), (0.25, 0.0))], names).splitlines()[2]
    assert line == "| StableOPD | .85 ± .07 [.80 .90] | .00 ± .00 | 2,000 ± 0 |"
    assert "| .50 |" in markdown([arm("a", (0.5,), (0.0,))], names), "one seed has no deviation"


def test_the_results_have_every_seed_of_every_measure():
    (found,) = results([arm("a", (0.8, 0.9), (0.25, 0.0))])
    assert (found["arm"], found["seeds"], found["sampled accuracy after"]) == ("a", [0, 1], [0.8, 0.9])
    assert found["highest truncation in training"] == [0.25, 0.0]


ARMS = [
    arm("stable", (0.9, 0.8, 0.7), (0.0, 0.3, 0.0)),
    arm("opd", (0.7, 0.6, 0.5), (1.0, 0.2, 0.6)),
    arm("guarded", (0.85, 0.1, 0.55)),
]


def test_just_half_truncated_is_not_past_half():
    """The bug: at exactly .50 the claims said that an arm had collapsed and the report that it had not."""
    even = arm("even", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert [inflated_at(run) for run in even.runs] == [None] * 3
    (verdict,) = judge([{"arm": "even", "passes_half_truncated_in_most": False}], [even])
    assert verdict.startswith("holds: even passes half truncated in most seeds: in 0 of 3")


@pytest.mark.parametrize(
    ("claim", "sentence"),
    [
        ({"arm": "stable", "above": "opd", "by": 0.1}, "holds: .* by 0.1: \\+0.200 in the mean"),
        ({"arm": "stable", "above": "opd", "by": 0.3}, "does not hold: "),
        ({"arm": "stable", "highest_truncation_below": 0.2}, "holds: .* below 0.2: 0.100"),
        ({"arm": "stable", "highest_truncation_below": 0.05}, "does not hold: "),
        ({"arm": "opd", "passes_half_truncated_in_most": True}, "holds: .* in 2 of 3"),
        ({"arm": "stable", "passes_half_truncated_in_most": True}, "does not hold: .* in 0 of 3"),
        # Seed 1 does not collapse, so that the guarded run's .1 there does not count.
        ({"arm": "guarded", "within": 0.2, "of": "stable", "where_collapses": "opd"}, "holds: .* in the 2 seeds"),
        ({"arm": "guarded", "within": 0.1, "of": "stable", "where_collapses": "opd"}, "does not .* \\+0.150 short"),
        ({"arm": "stable", "above": "sft", "by": 0.1}, "not judged, sft has not been run"),
    ],
)
def test_claims_are_judged_on_the_outcomes(claim, sentence):
    (verdict,) = judge([claim], ARMS)
    assert re.match(sentence, verdict)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{arm: StableOPD, above: other, by: 1}", "claim 1 is about 'other'; the arms are StableOPD"),
        ("{arm: StableOPD, by: 1}", "claim 1 has the keys arm, by; expected one of"),
    ],
)
def test_a_claim_about_nothing_is_refused(tmp_path, claim, message):
    path = tmp_path / "study.yaml"
    path.write_text(f"arms: {{StableOPD: {{}}}}\nclaims: [{claim}]")
    with pytest.raises(InputError, match=message):
        read_study(path)
