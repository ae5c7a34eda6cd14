"""Sets of held-out problems: avg@k and pass@k against counts of our own, who answers them, and how two are compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
from typing import Any

import pytest

import fake_ray
from driven_run import cast_of, drive
from fake_rooms import make_pipeline, stream
from fake_workers import FakeGenerator
from made_up_verdicts import drawn, evaluation, rows
from opd_ray.config import HELD_OUT, from_dict
from opd_ray.errors import InputError
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation, pass_at, score
from opd_ray.messages import PoolSize
from opd_ray.run import evaluate
from opd_ray.watch.observers import EvaluationProgress, say_evaluation


@pytest.mark.parametrize(("samples", "right"), [(n, c) for n in (1, 2, 4, 5) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(samples, right):
    answers = [i < right for i in range(samples)]
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(answers, k))
        assert pass_at(right, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_set_s_scores_are_those_of_a_count_by_hand():
    right = drawn(0)
    found = score(rows(right, {name: name == "p3" for name in right}))
    shares = [sum(each) / 4 for each in right.values()]
    assert found.accuracy_sampled == pytest.approx(statistics.fmean(shares))
    assert found.accuracy_sampled_se == pytest.approx(statistics.stdev(shares) / math.sqrt(30))
    assert found.accuracy_greedy == pytest.approx(1 / 30)
    assert (found.num_problems, found.samples, list(found.pass_at)) == (30, 4, ["1", "2", "4"])
    solved = [float(any(each)) for each in right.values()]
    assert found.pass_at["4"] == pytest.approx(statistics.fmean(solved))
    assert found.pass_at_se["4"] == pytest.approx(statistics.stdev(solved) / math.sqrt(30))
    assert found.pass_at["1"] == pytest.approx(found.accuracy_sampled)
    pairs = [[any(pair) for pair in itertools.combinations(each, 2)] for each in right.values()]
    assert found.pass_at["2"] == pytest.approx(statistics.fmean(statistics.fmean(each) for each in pairs))


def test_the_standard_error_is_by_how_much_accuracies_scatter():
    """Over problems, not over answers: four alike answers to a problem are no four measurements."""
    rng = random.Random(1)
    found = [score(rows({f"p{i}": [easy] * 4 for i in range(40) for easy in [rng.random() < 0.3]})) for _ in range(100)]
    scatter = statistics.stdev(each.accuracy_sampled for each in found)
    assert statistics.fmean(each.accuracy_sampled_se for each in found) == pytest.approx(scatter, rel=0.2)


def test_one_problem_has_no_error_and_one_sample_has_pass_at_1():
    alone = score(rows({"p": [True, False]}))
    assert (alone.accuracy_sampled, alone.accuracy_sampled_se, alone.pass_at_se["2"]) == (0.5, None, None)
    assert score(rows({"p": [True], "q": [False]})).pass_at == {"1": 0.5}
    assert list(score(rows({"p": [True] * 6})).pass_at) == ["1", "2", "4", "6"]


def test_the_average_is_over_sets_and_not_over_problems():
    small, large = score(rows(drawn(0, 4, 2))), score(rows(drawn(1, 40, 1), dict.fromkeys(drawn(1, 40, 1), True)))
    both = Evaluation.over({"small": small, "large": large}, {})
    assert both.accuracy_sampled == pytest.approx((small.accuracy_sampled + large.accuracy_sampled) / 2)
    assert both.accuracy_sampled_se == pytest.approx(
        math.sqrt(small.accuracy_sampled_se**2 + large.accuracy_sampled_se**2) / 2
    )
    assert (both.accuracy_greedy, both.num_problems) == (1.0, 44), "of the sets that have it; and all problems"
    alone = Evaluation.over({"small": small}, {})
    assert (
        dataclasses.asdict(small).items()
        >= {name: value for name, value in alone.saved().items() if name != "sets"}.items()
    )


def test_what_is_saved_comes_back_also_from_before_there_were_sets():
    found = evaluation(hard=rows(drawn(0)))
    saved = json.loads(json.dumps(found.saved()))
    assert Evaluation.of(saved) == found
    assert (saved["accuracy_greedy"], saved["sets"]["hard"]["pass_at"]["4"]) == (None, found.sets["hard"].pass_at["4"])
    old = {name: value for name, value in saved.items() if name not in ("sets", "accuracy_sampled_se")}
    assert Evaluation.of(old).accuracy_sampled == found.accuracy_sampled and Evaluation.of(old).sets == {}


def test_metrics_of_a_set_have_its_name_and_those_of_the_one_without_a_name_do_not():
    hard = score(rows(drawn(0)))
    named = Evaluation.over({"hard": hard}, {}).metrics()
    assert named["evaluation/hard/pass_at_4"] == hard.pass_at["4"]
    assert named["evaluation/hard/accuracy_sampled_se"] == hard.accuracy_sampled_se
    assert "evaluation/accuracy_greedy" not in named
    plain = Evaluation.over({HELD_OUT: hard}, {}).metrics()
    assert not [name for name in plain if name.count("/") > 1]
    assert plain["evaluation/accuracy_sampled"] == hard.accuracy_sampled


# ---- who answers ----


class Marked(FakeGenerator):
    """An answer is right by its seed alone, whoever gives it; greedy ones are all right."""

    async def generate(self, groups: Any, sampling: Any) -> tuple[Any, Any]:
        metas, payload = await super().generate(groups, sampling)
        self.log.append(("answers", self.actor.name, len(groups), groups[0].num_responses, sampling))
        seeds = [group.seed + i for group in groups for i in range(group.num_responses)]
        marked = [
            dataclasses.replace(each, correct=sampling.temperature == 0 or seed % 7 == 0)
            for each, seed in zip(metas, seeds, strict=True)
        ]
        return marked, payload


SETS = {
    "aime": {"samples": 4, "temperature": 0.6, "top_p": 0.95, "max_tokens": 9, "num_problems": 30},
    "math": {"num_problems": 50, "greedy": True},
}


def evaluated(generators: int, sets: Any = SETS, most: int | None = None) -> tuple[Evaluation, list[Any]]:
    """What the pipeline says, and what the workers were asked."""

    async def scenario() -> tuple[Evaluation, list[Any]]:
        made = await make_pipeline(
            evaluation={"sets": sets, "temperature": 0.7},
            rollout={"num_generators": generators, "max_num_seqs": 16},
            prepare=lambda cast: setattr(cast, "generator", Marked),
        )
        return await made.pipeline.evaluate(most), made.log

    return fake_ray.run(scenario())


def answered(log: list[Any]) -> list[tuple[str, int, int, Any]]:
    """Generator, problems, samples of each and sampling of every call."""
    return [call[1:] for call in log if call[0] == "answers"]


def test_avg_at_4_and_pass_at_4_are_those_of_an_independent_count():
    found, _ = evaluated(2)
    problems = stream()
    right = [[(problems[slot].seed + i) % 7 == 0 for i in range(4)] for slot in range(30)]
    aime = found.sets["aime"]
    assert aime.accuracy_sampled == pytest.approx(sum(map(sum, right)) / 120)
    assert aime.pass_at["4"] == pytest.approx(sum(map(any, right)) / 30)
    assert 0 < aime.accuracy_sampled < aime.pass_at["4"] < 1
    kept = verdicts.right_by_problem(found.verdicts["aime"])
    assert list(kept.values()) == right and list(kept) == [str(slot) for slot in range(30)]


def test_sets_are_spread_over_generators_and_no_call_is_wider_than_an_engine():
    found, log = evaluated(2)
    answers = dict.fromkeys(("student-generator-0", "student-generator-1"), 0)
    for name, problems, samples, _ in answered(log):
        assert problems * samples <= 16
        answers[name] += problems * samples
    assert sum(answers.values()) == 30 * 4 + 50 * 2
    assert min(answers.values()) > 220 / 4
    alone, _ = evaluated(1)
    assert alone == found, "whoever answers what"


def test_a_set_is_sampled_as_it_says_and_the_rest_as_the_section_does():
    _, log = evaluated(1)
    asked = {(each.temperature, each.top_p, each.max_response_tokens, k) for _, _, k, each in answered(log)}
    longest = from_dict({}).rollout.longest_response
    assert asked == {(0.6, 0.95, 9, 4), (0.7, 1.0, longest, 1), (0.0, 1.0, longest, 1)}


def test_greedy_is_asked_for_only_where_it_is_wanted():
    found, _ = evaluated(1)
    assert (found.sets["aime"].accuracy_greedy, found.sets["math"].accuracy_greedy) == (None, 1.0)
    none, log = evaluated(1, {"aime": SETS["aime"]})
    assert none.accuracy_greedy is None and all(each.temperature for _, _, _, each in answered(log))


def test_during_training_each_set_has_fewer_problems():
    found, _ = evaluated(1, most=5)
    assert [each.num_problems for each in found.sets.values()] == [5, 5]


def test_only_answers_of_the_student_s_own_distribution_are_shown_to_the_teacher():
    """At another temperature, or of a nucleus, its log-probs are not what the teacher's can be compared with."""

    def judged(**changes: Any) -> int:
        _, log = evaluated(1, {"one": {"num_problems": 2, "greedy": True, **changes}})
        return sum(call[0] == "teacher" for call in log)

    assert (judged(temperature=1.0), judged(temperature=1.0, top_p=0.9), judged(temperature=0.7)) == (1, 0, 0)


def test_a_teacher_that_the_rooms_have_for_another_run_is_not_shown_the_answers():
    """The bug: in a study, plain SFT behind a run across tokenizers failed, as that run's teacher knew no prompts of
    it."""

    async def scenario() -> list[Any]:
        sft = {"loss": {"student": {"coef": 0}, "reference": {"coef": 0}}, "evaluation": {"num_problems": 2}}
        made = await make_pipeline(buffer={"prompts_per_step": 0, "golden_per_step": 3}, **sft)
        pool = made.cast.pool("teacher", "teacher-scorer", made.cast.scorer, PoolSize.fixed(1))
        await pool.up(10)
        made.rooms.scorers["teacher"] = pool
        assert await made.pipeline.evaluate() is not None
        return made.log

    assert {call[0] for call in fake_ray.run(scenario())} == {"generate"}


def test_nothing_is_evaluated_where_nothing_is_asked_for():
    config = {"evaluation": {"num_problems": 0, "sets": SETS}}
    assert from_dict(config).evaluation_sets == {}

    async def scenario() -> Any:
        return await (await make_pipeline(**config)).pipeline.evaluate()

    assert fake_ray.run(scenario()) is None


# ---- what is kept, and how two are compared ----


def test_a_paired_difference_is_more_certain_than_two_accuracies():
    before = drawn(0, problems=200)
    after = {name: [True, *right[1:]] for name, right in before.items()}
    ours, theirs = {"aime": rows(after)}, {"aime": rows(before)}
    found = verdicts.compare(ours, theirs)["aime"]
    differences = [sum(after[name]) / 4 - sum(before[name]) / 4 for name in before]
    assert found.difference == pytest.approx(statistics.fmean(differences))
    assert found.difference_se == pytest.approx(statistics.stdev(differences) / math.sqrt(200))
    apart = [score(each["aime"]).accuracy_sampled_se for each in (ours, theirs)]
    assert found.difference_se < math.hypot(*apart) / 2
    assert found.num_problems == 200
    assert verdicts.compare(theirs, ours)["aime"].difference == pytest.approx(-found.difference)


def test_those_that_both_answered_are_compared_whatever_the_number_of_samples():
    found = verdicts.compare({"a": rows(drawn(0, 8, 4))}, {"a": rows(drawn(0, 8, 1) | {"p9": [True]})})
    assert found["a"].num_problems == 8


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"math": rows(drawn(0))}, "b has verdicts on math, but here it is aime that is answered"),
        ({}, "b has verdicts on no set"),
        ({"aime": rows(drawn(0), text="another")}, "its set aime has other problems than were answered here, as 'p0'"),
        ({"aime": rows({"q1": [True]})}, "its set aime has other problems than were answered here, as 'q1'"),
    ],
)
def test_other_problems_under_the_same_numbers_are_not_compared(theirs, said):
    with pytest.raises(InputError, match=said):
        verdicts.compare({"aime": rows(drawn(0))}, theirs, "b")


def test_verdicts_come_back_from_their_files_and_what_are_none_is_refused(tmp_path):
    kept = {"aime": rows(drawn(0), dict.fromkeys(drawn(0), True)), "math": rows(drawn(1, 5, 1))}
    verdicts.write(tmp_path / "deep" / "step-3", kept)
    found = verdicts.read(tmp_path / "deep" / "step-3")
    assert found == kept and score(found["aime"]) == score(kept["aime"])
    (tmp_path / "odd.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"odd.parquet: holds no verdicts .*evaluations/step-N"):
        verdicts.read(tmp_path)


def test_a_run_keeps_the_verdicts_of_every_evaluation_and_says_its_sets(tmp_path, capsys):
    summary, _ = drive(
        tmp_path,
        cast_of(evaluation={"sets": SETS, "num_problems": 512, "every_steps": 3, "num_problems_during": 2}),
    )
    files = {str(path.relative_to(tmp_path / "evaluations")) for path in (tmp_path / "evaluations").rglob("*")}
    assert {name for name in files if "/" in name} == {
        f"step-{step}/{name}.parquet" for step in (0, 3, 6) for name in SETS
    }
    assert {len(verdicts.read(verdicts.directory(tmp_path, step))["math"]) for step in (0, 6)} == {100}
    assert len(verdicts.read(verdicts.directory(tmp_path, 3))["math"]) == 4
    assert list(summary["eval_after"]["sets"]) == ["aime", "math"]
    assert summary["eval_after"]["sets"]["aime"]["num_problems"] == 30
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation/aime/pass_at_4" in line] == [0, 3, 6]
    said = capsys.readouterr().out
    assert "evaluation before: greedy" in said and "    aime: sampled 0.500 ± " in said and "pass@4 0.500" in said


def test_a_run_that_goes_back_has_no_verdicts_of_what_did_not_happen(tmp_path):
    for step in (0, 5, 10):
        verdicts.write(verdicts.directory(tmp_path, step), {"a": rows(drawn(0))})
    verdicts.forget(tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == ["step-0", "step-5"]


def test_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("opd_ray.watch.observers.time.monotonic", lambda: now[0])
    tell = EvaluationProgress()
    for done in range(10, 60, 10):
        now[0] += 4
        tell(done, 2000)
    assert capsys.readouterr().out == "evaluating: 30 of 2,000 answers, 13:08 left\n"


def test_a_single_set_without_a_name_is_said_in_one_line():
    said = []
    say_evaluation(
        lambda kind, text, **_: said.append(text), "before", evaluation(held_out=rows({"p": [True], "q": [False]}))
    )
    assert said == [
        "evaluation before: sampled 0.500 ± 0.500, truncated 0.000, repetitive 0.000, length 8.0 (2 problems)"
    ]


def test_a_checkpoint_is_asked_the_problems_of_the_setting_that_trained_it(monkeypatch):
    """The bug that was in reach: the checkpoint's path stood in the student's place before the word for the setting was
    read, and a student of the harder setting would have been asked short chains."""

    def far_enough(config):
        raise InputError(f"resolved with {config.student.path}")

    monkeypatch.setattr(evaluate, "resolve", far_enough)
    monkeypatch.setattr(evaluate, "locate", lambda name, path: path)
    with pytest.raises(InputError, match="resolved with embedded-hard"):
        evaluate.measured(["/checkpoint"], from_dict({"student": {"path": "embedded-hard"}}))
