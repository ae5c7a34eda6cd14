"""Studies: which arms and runs there are, what is left to do, and the table."""

import contextlib
import dataclasses
import json
import math
import re
import types
from pathlib import Path

import pytest
import yaml

from made_up_verdicts import rows
from opd_ray.errors import InputError
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation
from opd_ray.report import answers
from opd_ray.report.arms import TRUNCATION, Arm, inflated_at, markdown, results
from opd_ray.report.runs import Run
from opd_ray.study.claims import judge
from opd_ray.study.reading import read_study
from opd_ray.study.study import _before, _teacher_data, run_study, shared_rooms

JOBS = Path(__file__).parents[2] / "jobs"

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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner=[1]", "arm 'StableOPD': config: learner: Input should be a dictionary"),  # was a traceback
        ("seed=5", "arm 'StableOPD' has the field seed"),  # was read and ignored
        ("jobs/collapses.yaml", "override 'jobs/collapses.yaml' is not of the form section.field=value"),
    ],
)
def test_an_override_that_no_arm_can_take_is_refused(study, override, message):
    with pytest.raises(InputError, match=message):
        read_study(study, [override])


def test_an_arm_may_run_on_the_first_seeds_only(tmp_path):
    wide, narrow = arms_of(tmp_path, "arms: {a: {}, b: {seeds: 2}}")
    assert (wide.seeds([3, 5, 7]), narrow.seeds([3, 5, 7])) == ([3, 5, 7], [3, 5])
    with pytest.raises(InputError, match="arm 'b': seeds is 0, expected how many"):
        arms_of(tmp_path, "arms: {a: {}, b: {seeds: 0}}")


def test_arms_are_picked_by_name_or_directory(study):
    assert [arm.name for arm in read_study(study, only=["opd-full"]).arms] == ["OPD, full"]
    assert [arm.name for arm in read_study(study, only=["opd-full", "StableOPD"]).arms] == ["OPD, full", "StableOPD"]
    with pytest.raises(InputError, match="no arm 'opd'; it has stableopd, opd-full"):
        read_study(study, only=["opd"])


def test_a_study_extends_another(study, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "extends: study.yaml\nseeds: {number: 2}\ncommon: {learner: {lr: 0.5}}\narms: {more: {learner: {steps: 8}}}"
    )
    more = read_study(tmp_path / "more.yaml")
    assert [(arm.name, arm.config(0).learner.steps, arm.config(0).learner.lr) for arm in more.arms] == [
        ("StableOPD", 7, 0.5),
        ("OPD, full", 7, 0.5),
        ("more", 8, 0.5),
    ]
    (tmp_path / "more.yaml").write_text("extends: study.yaml\narms: {StableOPD: {}}")
    with pytest.raises(InputError, match="arm 'StableOPD' is in the study that it extends, too"):
        read_study(tmp_path / "more.yaml")


def test_seeds_are_those_of_the_file_or_counted_from_its_first_or_listed(tmp_path):
    (tmp_path / "study.yaml").write_text("seeds: {first: 300, number: 3}\narms: {a: {}}")
    study = read_study(tmp_path / "study.yaml")
    assert [study.seeds(asked) for asked in ("", "2", "7,", "7, 9, 7")] == [[300, 301, 302], [300, 301], [7], [7, 9]]
    with pytest.raises(InputError, match="--seeds 0: expected a number of seeds"):
        study.seeds("0")
    with pytest.raises(InputError, match="--seeds 301: expected 100 seeds at most; the one seed is '301,'"):
        study.seeds("301")  # which began with 301 runs


TUNED = """
seeds: {first: 300, number: 2}
tuning: {seeds: [100, 101], rates: [0.001, 0.002, 0.004], chosen: rates.yaml}
common: {learner: {lr: 0.5, steps: 7}}
arms: {a: {}, b: {learner: {lr: 0.25}}}
"""


@pytest.fixture
def tuned(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(TUNED)
    return path


def tune(path: Path, directory: Path, accuracies: dict[str, list[tuple[float, float]]], *overrides: str) -> list:
    """Chooses after made-up runs: of each arm the accuracies of both seeds at the three rates."""
    study = read_study(path, overrides, list(accuracies), tuned=False)
    for arm in study.arms:
        for rate, each in zip(study.tuning.rates, accuracies[arm.name], strict=True):
            for seed, accuracy in zip(study.tuning.seeds, each, strict=True):
                finish(directory, study.tuning.at(arm, rate), seed, accuracy)
    return study.tuning.choose(study.arms, directory)


def test_every_arm_gets_its_own_rate_by_one_rule_and_overrides_win(tuned, tmp_path):
    assert read_study(tuned).untuned == ("a", "b")
    tune(tuned, tmp_path / "first", {"a": [(0.2, 0.3), (0.5, 0.1), (0.3, 0.3)]})  # means .25, .30, .30
    study = read_study(tuned)
    assert [arm.config(300).learner.lr for arm in study.arms] == [0.002, 0.25] and study.untuned == ("b",)
    tune(tuned, tmp_path / "second", {"b": [(0.2, 0.2), (0.1, 0.1), (0.3, 0.3)]})
    assert [arm.config(300).learner.lr for arm in read_study(tuned).arms] == [0.002, 0.004], "each keeps its own"
    assert {arm.config(300).learner.lr for arm in read_study(tuned, ["learner.lr=0.7"]).arms} == {0.7}
    assert {arm.config(0).learner.lr for arm in read_study(tuned, tuned=False).arms} == {0.5, 0.25}
    kept = yaml.safe_load((tmp_path / "rates.yaml").read_text())
    assert len(kept["a"].pop("settings")) == 16
    assert kept["a"] == {
        "lr": 0.002,
        "seeds": [100, 101],
        "accuracies": {"0.001": [0.2, 0.3], "0.002": [0.5, 0.1], "0.004": [0.3, 0.3]},
    }


def test_a_rate_at_the_edge_of_those_tried_is_told(tuned, tmp_path):
    found = tune(tuned, tmp_path / "runs", {"a": [(0.2, 0.2), (0.5, 0.5), (0.3, 0.3)], "b": [(0.9, 0.9)] * 3})
    tuning = read_study(tuned).tuning
    assert {name: (choice["lr"], tuning.at_the_edge(choice)) for name, choice in found.items()} == {
        "a": (0.002, False),
        "b": (0.001, True),
    }


def test_beyond_an_edge_that_is_best_the_next_rates_are_tried_twice_and_no_further(tuned, tmp_path):
    accuracies = {"a": [(0.2, 0.2), (0.5, 0.5), (0.3, 0.3)], "b": [(0.3, 0.3), (0.4, 0.4), (0.5, 0.5)]}
    found = tune(tuned, tmp_path / "runs", accuracies)
    study = read_study(tuned, tuned=False)
    tried = []
    for accuracy in (0.6, 0.7):
        [arm] = study.tuning.beyond(study.arms, found)
        tried.append(arm.config(100).learner.lr)
        finish(tmp_path / "runs", arm, 100, accuracy)
        assert study.tuning.choose(study.arms, tmp_path / "runs")["b"]["lr"] == max([0.004, *tried[:-1]]), "half tried"
        finish(tmp_path / "runs", arm, 101, accuracy)
        found = study.tuning.choose(study.arms, tmp_path / "runs")
        assert found["b"]["lr"] == tried[-1]
    assert tried == [0.008, 0.016] and study.tuning.at_the_edge(found["b"])
    assert study.tuning.beyond(study.arms, found) == []

    (tmp_path / "rates.yaml").unlink()
    low = tune(tuned, tmp_path / "others", {"a": [(0.5, 0.5), (0.2, 0.2), (0.3, 0.3)]})
    [arm] = study.tuning.beyond(study.arms[:1], low)
    assert arm.config(100).learner.lr == 0.0005
    for seed in (100, 101):
        finish(tmp_path / "others", arm, seed, 0.4)
    low = study.tuning.choose(study.arms[:1], tmp_path / "others")
    assert low["a"]["lr"] == 0.001 and study.tuning.beyond(study.arms[:1], low) == []


def test_tuning_is_a_study_of_each_arm_at_each_rate_that_goes_on_where_it_stopped(tuned, tmp_path):
    study, said = read_study(tuned, tuned=False), []
    arms = study.tuning.arms(study.arms)
    assert [(arm.directory, arm.config(100).learner.lr) for arm in arms][:2] == [
        ("a-lr-0-001", 0.001),
        ("a-lr-0-002", 0.002),
    ]
    for arm in arms:
        finish(tmp_path, arm, 100, 0.5)
    run_study(arms, [100], tmp_path, said.append)
    assert said == ["6 arms on 1 seeds: 6 runs are done, 0 to go"]


def test_rates_are_not_tuned_where_nothing_is_measured(tuned):
    study = read_study(tuned, ["evaluation.num_problems=0"], tuned=False)
    with pytest.raises(InputError, match="arm 'a': evaluation.num_problems is 0, but rates are chosen by held-out"):
        study.tuning.arms(study.arms)


def test_seeds_that_rates_are_chosen_on_are_not_reported(tuned):
    with pytest.raises(InputError, match="learning rates are chosen on seed 101; report others"):
        read_study(tuned).seeds("101,102")


def test_seeds_that_the_rates_in_the_file_were_chosen_on_are_not_reported_either(tuned, tmp_path):
    """The study has other tuning seeds now, but arms still run at what was chosen on the former ones."""
    tune(tuned, tmp_path / "runs", {"a": [(0.2, 0.2), (0.5, 0.5), (0.3, 0.3)]})
    tuned.write_text(TUNED.replace("[100, 101]", "[200]"))
    with pytest.raises(InputError, match="learning rates are chosen on seed 100; report others"):
        read_study(tuned).seeds("100,")


def test_a_rate_that_was_chosen_with_other_settings_is_told(tuned, tmp_path):
    """As after a short trial of --tune with learner.steps=3."""
    rates = [(0.2, 0.2), (0.5, 0.5), (0.3, 0.3)]
    tune(tuned, tmp_path / "trial", {"a": rates}, "learner.steps=3")
    assert read_study(tuned).chosen_otherwise == ("a",)
    assert read_study(tuned, ["learner.steps=3"]).chosen_otherwise == ()
    tune(tuned, tmp_path / "whole", {"a": rates, "b": rates})
    assert read_study(tuned).chosen_otherwise == read_study(tuned, ["learner.steps=3"]).chosen_otherwise == ()


def test_a_file_of_rates_that_is_none_is_refused(tuned, tmp_path):
    (tmp_path / "rates.yaml").write_text("- 0.001")
    with pytest.raises(InputError, match="expected a mapping of arms to their rates"):
        read_study(tuned)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {loss: {golden: {coef: 0}}}}", "arm 'a': config: golden rollouts are made"),
        ("arms: {a: {los: {}}}", "arm 'a': config: unknown field 'los'"),
        ("common: {}", "expected 'arms', a mapping"),
        ("arms: {a: {}}\nseeds: 3", "seeds is 3, expected first and number"),
        ("arms: {a: {}}\nseeds: {number: 0}", "seeds is {'number': 0}, expected first and number"),
        ("arms: {a: {}}\nsedes: 3", "key 'sedes': expected 'arms', a mapping"),
        ("arms: {a: {}}\nextends: none.yaml", "none.yaml: No such file"),
        ("arms: {a: {}}\ntuning: {seeds: [1], rates: [0]}", "tuning is .*, expected seeds .*, rates"),
        ("arms: {a: {}}\nclaims: 3", "claims is 3, expected 'claims', a list"),
        ("arms: {a: 3}", "arm 'a' is 3, expected a name in quotes and its settings"),
        ("arms: {1: {}}", "arm 1 is {}, expected a name in quotes"),
        ("arms: {}", "expected 'arms', a mapping"),
        ("arms: {a: {}}\ncommon: [1]", "common is .*, expected 'common', a mapping"),
        ("arms: {a: {}}\nextends: study.yaml", "it extends itself"),
        ("arms: {'a, b': {}, 'a b': {}}", "the arms 'a, b' and 'a b' have one directory, a-b"),
        ("arms: [", "study"),
        # Were tracebacks, of OmegaConf's merge, of Python's int() and of the file's text.
        ("common: {learner: {lr: 0.1}}\narms: {a: {learner: [1]}}", "arm 'a': config: learner: Input should be"),
        ("arms: {a: {data: {golden: 'teacher-rollouts:²'}}}", "teacher-rollouts:², expected teacher-rollouts:N"),
        (f"arms: {{a: {{learner: {{lr: {'1' * 5000}}}}}}}", "Exceeds the limit"),
        ("arms: {a: {name: \udcff}}", "can't decode byte 0xff"),
        # Were read and ignored.
        ("common: {learner: {lr: 0.1}}\narms: {a: {learner: '???'}}", "arm 'a': config: learner: Input should be"),
        ("arms: {a: {seed: 5}}", "arm 'a' has the field seed, but its runs are of the study's seeds"),
        ("common: {name: b}\narms: {a: {}}", "arm 'a' has the field name"),
    ],
)
def test_a_bad_study_is_refused_in_one_line_before_anything_starts(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


def arms_of(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return read_study(path).arms


OFF_POLICY = """{rollout: {responses_per_prompt: 0}, buffer: {teacher_per_prompt: 1},
    loss: {student: {coef: 0}, teacher: {coef: 1}, reference: {coef: 0}}}"""


def test_the_rooms_are_the_union_of_what_the_arms_need(tmp_path):
    """The bug: a study was refused where no single arm needed all rooms, as one of StableOPD and an arm on live teacher
    rollouts, which needs no scorer."""
    wanted = shared_rooms(arms_of(tmp_path, f"arms: {{kd: {OFF_POLICY}, stable: {{}}}}"), 0)
    assert {role: config.name for role, config in wanted.scorers.items()} == {
        "teacher": "stable",
        "reference": "stable",
    }
    assert (wanted.first.name, wanted.writer.name) == ("kd", "kd")
    assert shared_rooms(arms_of(tmp_path, "arms: {stable: {}}"), 0).writer is None


def test_a_scorer_that_follows_the_student_in_one_arm_is_started_so_for_all(tmp_path):
    arms = arms_of(tmp_path, "arms: {fixed: {}, renewed: {reference: {update: periodic}}}")
    assert shared_rooms(arms, 0).scorers["reference"].name == "renewed"


@pytest.mark.parametrize(
    "name", ["ablation", "collapses", "map", "misled", pytest.param("leaderboard", marks=pytest.mark.slow)]
)
def test_the_studies_in_jobs_are_whole_and_report_no_seed_that_was_looked_at_before(name):
    study = read_study(JOBS / f"{name}.yaml")
    shared_rooms(study.arms, study.first_seed)
    directories = [arm.directory for arm in study.arms]
    assert len(set(directories)) == len(directories)
    seeds = {*study.seeds("10"), *study.seeds()}
    assert seeds == set(range(300, 310)) and not seeds & {*range(5), *range(100, 104), *range(200, 205)}


def test_rooms_of_all_arms_that_the_cluster_does_not_hold_at_once_are_refused(tmp_path, monkeypatch):
    """Each arm's own would fit: their actors would have waited for each other until deadlines.start_s."""
    asks = "{common: {learner: {cpus_per_rank: 1}, rollout: {cpus_per_generator: 1}, teacher: {cpus_per_actor: 1},"
    arms = arms_of(tmp_path, f"{asks} reference: {{cpus_per_actor: 1}}}}, arms: {{kd: {OFF_POLICY}, stable: {{}}}}}}")
    monkeypatch.setattr("opd_ray.study.study.cluster", contextlib.nullcontext)
    monkeypatch.setattr("opd_ray.placement.capacity.cluster_capacity", lambda _: {"CPU": 4.0})
    monkeypatch.setattr("opd_ray.placement.capacity.may_grow", lambda: False)
    with pytest.raises(InputError, match=r"5 CPUs asked .*teacher generators 1 x 1, .*4 there"):
        run_study(arms, [0], tmp_path, print)


@pytest.fixture
def sampled(monkeypatch):
    """What would be looked at and sampled, in place of both."""
    looked = []

    def check_files(config):
        looked.append(config)
        return types.SimpleNamespace(commits={})

    async def sample(config, facts, path, count):
        looked.append((config, path.name, count))

    monkeypatch.setattr("opd_ray.study.study.resolve", lambda config: config)
    monkeypatch.setattr("opd_ray.run.preflight.check_files", check_files)
    monkeypatch.setattr("opd_ray.study.teacher_data.sample", sample)
    return looked


ON_TEACHER_ROLLOUTS = (
    "{loss: {student: {coef: 0}, reference: {coef: 0}}, buffer: {prompts_per_step: 0, golden_per_step: 64}, "
    "data: {golden: 'teacher-rollouts:8'}}"
)


def test_a_study_whose_every_arm_waits_for_rollouts_of_the_teacher_samples_them(tmp_path, sampled):
    """The bug: what samples them was started with the configuration of an arm, whose golden file they are to be."""
    arms = arms_of(tmp_path, f"arms: {{few: {ON_TEACHER_ROLLOUTS}}}")
    _teacher_data(tmp_path, arms, 0, {}, print)
    config = sampled[0]
    assert config.data.golden is None and not config.loads_golden
    assert sampled[1:] == [(config, "teacher-rollouts-8.parquet", 8)]


def test_the_teacher_whose_rollouts_an_arm_trains_on_is_its_own(tmp_path, sampled):
    """The bug: it was that of the first arm which waited for none."""
    arms = arms_of(tmp_path, f"arms: {{other: {{teacher: {{path: other}}}}, few: {ON_TEACHER_ROLLOUTS}, own: {{}}}}")
    _teacher_data(tmp_path, arms, 0, {}, print)
    assert sampled[0].teacher.path == "embedded" and sampled[0].name == "own"


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


def test_a_finished_run_with_other_settings_is_refused_on_whatever_seed(study, tmp_path):
    """The bug: `--seeds 7, learner.steps=3` and then the study in the same directory gave one table of both."""
    arm, _ = read_study(study).arms
    for seed in (0, 7):
        finish(tmp_path, arm, seed, 0.5)
    (arm.run_directory(tmp_path, 7) / "arm.json").write_text(json.dumps({"learner": {"steps": 3}}))
    with pytest.raises(InputError, match="seed-7 was made with other settings of arm 'StableOPD'"):
        run_study([arm], [0], tmp_path, print)


def test_a_students_evaluation_is_that_of_an_arm_of_the_study(study, tmp_path, monkeypatch):
    """What another study left in the directory may have asked fewer problems."""
    monkeypatch.setattr(Evaluation, "of", dict)
    stable, opd = read_study(study).arms
    finish(tmp_path, opd, 0, 0.5)
    assert _before(tmp_path, [stable], 0) is None and _before(tmp_path, [opd], 1) is None
    assert _before(tmp_path, [stable, opd], 0)["accuracy_sampled"] == 0.5


def arm(label, sampled, most_truncated=None):
    """An arm of finished runs, seeds from 0 on."""
    runs = []
    for seed, (accuracy, rate) in enumerate(zip(sampled, most_truncated or [0.0] * len(sampled), strict=True)):
        after = {"accuracy_sampled": accuracy, "accuracy_greedy": 1.0, "truncation_rate": 0.0}
        summary = {"eval_after": after, "trained_tokens": 2000}
        runs.append(Run(Path(f"{label}-{seed}"), label, seed, {}, summary, {TRUNCATION: {1: 0.0, 2: rate}}))
    return Arm(label, tuple(runs))


def test_the_table_has_the_seeds_the_mean_its_error_and_every_seed():
    names = ("sampled accuracy after", "truncated after", "trained tokens")
    line = markdown([arm("StableOPD", (0.8, 0.9), (0.25, 0.0))], names).splitlines()[2]
    assert line == "| StableOPD | 2 | .85 ± .05 [.80 .90] | .00 ± .00 | 2,000 ± 0 |"
    assert "| 1 | .50 |" in markdown([arm("a", (0.5,), (0.0,))], names), "one seed has no error"


def test_the_results_have_every_seed_of_every_measure_and_the_errors():
    (found,) = results([arm("a", (0.8, 0.9), (0.25, 0.0))])
    assert (found["arm"], found["seeds"], found["sampled accuracy after"]) == ("a", [0, 1], [0.8, 0.9])
    assert found["highest truncation in training"] == [0.25, 0.0]
    assert found["standard errors"]["sampled accuracy after"] == pytest.approx(0.05)
    assert found["greedy accuracy after"] == [1.0, 1.0]


def answered(directory: Path, label: str, by_step: list[dict[int, list[bool]]]) -> Arm:
    """An arm of a run for each seed, evaluated after some steps: are the sampled answers to its problems right?"""
    runs = []
    for seed, steps in enumerate(by_step):
        path = directory / f"{label}-{seed}"
        for step, right in steps.items():
            kept = rows({str(problem): [answer] for problem, answer in enumerate(right)})
            verdicts.write(verdicts.directory(path, step), {"held_out": kept})
        last = steps[max(steps)]
        summary = {"eval_after": {"accuracy_sampled": sum(last) / len(last)}}
        runs.append(Run(path, label, seed, {}, summary, {}))
    return Arm(label, tuple(runs))


T, F = True, False


def test_errors_are_over_seeds_and_over_problems(tmp_path):
    """Two seeds whose accuracies are the same by chance are not known exactly: other problems would give another."""
    (found,) = results([answered(tmp_path, "a", [{2: [T, T, F, F]}, {2: [T, T, F, F]}])])
    over_problems = math.sqrt((4 * 0.25 / 3) / 4)
    assert found["standard errors"]["sampled accuracy after"] == pytest.approx(over_problems)


def test_a_difference_is_paired_by_seed_and_by_problem(tmp_path):
    ten = [{2: [T, F] * 8}] * 10
    better = answered(tmp_path, "better", [{2: [T, T] * 8}] * 10)
    (verdict,) = judge([{"arm": "better", "above": "worse", "by": 0.1}], [better, answered(tmp_path, "worse", ten)])
    assert (verdict.verdict, verdict.p, verdict.interval) == ("holds", pytest.approx(2 / 1024), (0.5, 0.5))
    assert "+0.500 ± 0.129, so on 10 of 10 seeds" in verdict.found  # half of 16 problems: √(4/15/16)


def test_the_best_step_is_judged_on_the_problems_that_all_evaluations_asked(tmp_path):
    """At step 4 the last evaluation asks two problems more, which are easy: they do not make it the best."""
    steps = {2: [T, T, F, F], 3: [F, F, F, F], 4: [T, F, F, F, T, T]}
    (found,) = results([answered(tmp_path, "a", [steps, {2: [T]}])])
    assert found["best step"] == [2, None], "one evaluation has no best"
    assert found["best step above last"] == [pytest.approx(0.25), None]


def test_a_last_evaluation_that_cannot_be_read_leaves_no_best_step(tmp_path):
    (made,) = answered(tmp_path, "a", [{2: [T, F], 3: [F, F], 4: [T, T]}]).runs
    (verdicts.directory(made.path, 4) / "held_out.parquet").write_bytes(b"cut off")
    assert answers.best_step(made) is None


ARMS = [
    arm("stable", [0.9, 0.8, 0.7, 0.9, 0.8, 0.7, 0.9, 0.8, 0.7, 0.8], [0.0, 0.3, 0.0, 0.1, 0, 0, 0, 0, 0, 0]),
    arm("opd", [0.7, 0.6, 0.5, 0.7, 0.6, 0.5, 0.7, 0.6, 0.5, 0.6], [1.0, 0.2, 0.6, 1, 1, 1, 1, 1, 1, 1]),
    arm("noisy", [0.95, 0.4, 0.9, 0.5, 0.95, 0.4, 0.9, 0.5, 0.9, 0.9], [1.0, 0.2, 0.6, 0.1, 1, 0, 1, 0, 1, 0]),
    arm("nine", [0.9, 0.8, 0.7, 0.9, 0.8, 0.7, 0.9, 0.8, 0.7]),
]


def test_just_half_truncated_is_not_past_half():
    """The bug: at exactly .50 the claims said that an arm had collapsed and the report that it had not."""
    even = arm("even", [0.5] * 10, [0.5] * 10)
    assert [inflated_at(run) for run in even.runs] == [None] * 10
    (verdict,) = judge([{"arm": "even", "passes_half_truncated_in_most": False}], [even])
    assert str(verdict).startswith("holds: even passes half truncated in few seeds: in 0 of 10")


def test_a_run_that_was_cut_off_says_nothing_about_a_claim():
    """Its few steps had passed half truncated in no seed."""
    opd = ARMS[1]
    begun = [
        dataclasses.replace(run, summary={}, seed=20 + run.seed, metrics={TRUNCATION: {1: 0.0}}) for run in opd.runs
    ]
    both = Arm("opd", (*opd.runs, *begun))
    claims = [
        {"arm": "opd", "passes_half_truncated_in_most": True},
        {"arm": "opd", "below": 0.2, "measure": "highest truncation in training"},
    ]
    assert [each.seeds for each in judge(claims, [both])] == [tuple(range(10))] * 2
    (verdict,) = judge(claims[:1], [Arm("opd", tuple(begun))])
    assert verdict.verdict == "not judged"


@pytest.mark.parametrize(
    ("claim", "sentence"),
    [
        (
            {"arm": "stable", "above": "opd", "by": 0.1},
            r"holds: .* by more than 0.1: \+0.200 ± 0.000, .* 10 of 10 seeds",
        ),
        ({"arm": "stable", "above": "opd", "by": 0.3}, r"fails: .* \(95 % \[\+0.200, \+0.200\], p = 0.002\)"),
        ({"arm": "stable", "above": "noisy", "by": 0}, r"not decided: .* so on 4 of 10 seeds \(95 % \[-"),
        ({"arm": "noisy", "above": "stable", "by": -0.5}, "holds: .* or less than 0.5 below: "),
        # The same differences on nine seeds decide nothing.
        ({"arm": "nine", "above": "opd", "by": 0.1}, r"not decided: .* p = 0.0039; 9 seeds, 10 decide\)"),
        (
            {"arm": "stable", "above": "opd", "by": 0, "measure": "greedy accuracy after"},
            r"not decided: .* in greedy .*p = 1\)",
        ),
        (
            {"arm": "stable", "below": 0.2, "measure": "highest truncation in training"},
            "holds: stable below 0.2 in highest truncation in training: 0.040 ± ",
        ),
        ({"arm": "opd", "below": 0.2, "measure": "highest truncation in training"}, "fails: .* so on 0 of 10"),
        ({"arm": "opd", "passes_half_truncated_in_most": True}, "holds: .* in most seeds: in 9 of 10"),
        ({"arm": "noisy", "passes_half_truncated_in_most": True}, "not decided: .* in 5 of 10"),
        ({"arm": "stable", "passes_half_truncated_in_most": True}, "fails: .* in 0 of 10"),
        ({"arm": "stable", "above": "sft", "by": 0.1}, "not judged: sft has not been run"),
    ],
)
def test_claims_are_judged_by_the_seeds(claim, sentence):
    (verdict,) = judge([claim], ARMS)
    assert re.match(sentence, str(verdict))
    assert json.loads(json.dumps(verdict.saved()))["verdict"] == verdict.verdict


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{arm: StableOPD, above: other, by: 1}", "claim 1 is about 'other'; the arms are StableOPD"),
        ("{arm: StableOPD, by: 1}", "claim 1 has the keys arm, by; expected one of"),
        ("{arm: StableOPD, below: 1, measure: length}", "claim 1: measure is 'length'; the measures are sampled"),
        ("{arm: StableOPD, passes_half_truncated_in_most: never}", "in_most is 'never', expected true or false"),
        ("{arm: StableOPD, below: low}", "claim 1: below is 'low', expected a number"),
    ],
)
def test_a_claim_about_nothing_is_refused(tmp_path, claim, message):
    path = tmp_path / "study.yaml"
    path.write_text(f"arms: {{StableOPD: {{}}}}\nclaims: [{claim}]")
    with pytest.raises(InputError, match=message):
        read_study(path)
