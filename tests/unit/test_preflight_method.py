"""Preflight of what a method asks for: routed teachers, answers to judge by, models that only some methods load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_ray.run import preflight
from tiny_checkpoints import CHARACTERS, configured, make_checkpoint, make_setting, refused, write_jsonl

LIVE_TEACHER = {"buffer__teacher_per_prompt": "1", "loss__teacher__coef": "1"}
GRPO = {
    "loss__student__divergence": "k1",
    "loss__advantage__teacher_coef": "0",
    "loss__advantage__reward_coef": "1",
    "rollout__responses_per_prompt": "4",
}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def prompts(setting: dict[str, str], *rows: dict[str, Any]) -> None:
    write_jsonl(Path(setting["data.prompts"]), rows)


# ---- several teachers ----


def test_a_row_may_ask_for_any_teacher_of_the_run(setting: dict[str, str], tmp_path: Path) -> None:
    prompts(setting, {"prompt": "1=", "answer": "1", "teacher": "code"}, {"prompt": "2=", "answer": "2"})
    make_checkpoint(tmp_path / "code", eos=[2])
    config = configured(setting, more_teachers__code__path=str(tmp_path / "code"))
    assert preflight.check_files(config).eos_token_ids == (1, 2)
    preflight.check_resources(config, lambda _: {"CPU": 2.0})
    wide = configured(setting, more_teachers__code__path="/code", more_teachers__code__num_actors="90")
    assert "code 90 x 0.1" in refused(lambda: preflight.check_resources(wide, lambda _: {"CPU": 2.0}))


@pytest.mark.parametrize("file", ["prompts", "golden"])
def test_a_row_that_asks_for_an_unknown_teacher_is_refused(setting: dict[str, str], tmp_path: Path, file: str) -> None:
    rows = [{"prompt": "1=", "answer": "1", "response": "1"}, {"prompt": "2=", "answer": "2", "response": "2"}]
    write_jsonl(tmp_path / f"{file}.jsonl", [rows[0], rows[1] | {"teacher": "cod"}])
    config = configured(setting, more_teachers__code__path=str(tmp_path / "teacher"))
    message = refused(lambda: preflight.check_files(config))
    assert f"{file}.jsonl row 2: asks for the teacher 'cod', which the configuration does not have" in message
    assert "did you mean 'code'?" in message


def test_routes_do_not_matter_where_no_teacher_is_asked(setting: dict[str, str]) -> None:
    prompts(setting, {"prompt": "1=", "answer": "1", "teacher": "anybody"})
    sft = {"buffer__prompts_per_step": "0", "buffer__golden_per_step": "4"}
    preflight.check_files(configured(setting, **sft, loss__student__coef="0", loss__reference__coef="0"))


def test_further_teachers_are_checked_like_the_first(setting: dict[str, str], tmp_path: Path) -> None:
    missing = configured(setting, more_teachers__code__path="/no/where")
    message = refused(lambda: preflight.check_files(missing))
    assert message.startswith("more_teachers.code.path=/no/where: no such directory")
    code = str(make_checkpoint(tmp_path / "code", context=24))
    message = refused(lambda: preflight.check_files(configured(setting, more_teachers__code__path=code)))
    assert "more than the context of 24 of more_teachers.code.path=" in message
    make_checkpoint(tmp_path / "code", tokens=[*CHARACTERS[:-1], "c"])
    message = refused(lambda: preflight.check_files(configured(setting, more_teachers__code__path=code)))
    assert "more_teachers.code.path=" in message and "(token 'b' is absent there, id 17 in the student's)" in message
    other = configured(
        setting, more_teachers__code__path=setting["teacher.path"], more_teachers__code__eos_token_ids="[5]"
    )
    assert "more_teachers.code.eos_token_ids names token 5" in refused(lambda: preflight.check_files(other))


def test_a_further_teacher_must_have_something_to_score(setting: dict[str, str]) -> None:
    """The bug: its actors started, and waited for the whole run."""
    teacher = {"more_teachers__code__path": setting["teacher.path"]}
    message = refused(lambda: preflight.check_files(configured(setting, **teacher)))
    assert message.startswith("more_teachers.code: no row names it in the column teacher")
    preflight.check_files(configured(setting, **teacher, loss__teachers="weighted"))
    golden = [{"prompt": "2+2=", "answer": "4", "response": "4", "teacher": "code"}]
    write_jsonl(Path(setting["data.golden"]), golden)
    preflight.check_files(configured(setting, **teacher))


@pytest.mark.parametrize("name", ["reference", "student"])
def test_a_teacher_cannot_have_the_name_of_another_role(setting: dict[str, str], name: str) -> None:
    message = refused(lambda: configured(setting, **{f"more_teachers__{name}__path": "/code"}))
    assert f"the name '{name}' is taken" in message


def test_the_student_may_be_its_own_teacher(setting: dict[str, str]) -> None:
    preflight.check_files(configured(setting, teacher__path="student"))


# ---- a teacher that writes ----


def test_a_teacher_that_only_writes_is_checked_but_not_scored_with(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", eos=[2])
    kd = configured(
        setting, **LIVE_TEACHER, rollout__responses_per_prompt="0", loss__student__coef="0", loss__reference__coef="0"
    )
    assert preflight.check_files(kd).eos_token_ids == (1, 2)
    preflight.check_resources(kd, lambda _: {"CPU": 1.5})  # learner and one generator of each kind
    assert "teacher generators 1 x 0.5" in refused(lambda: preflight.check_resources(kd, lambda _: {"CPU": 1.4}))
    make_checkpoint(tmp_path / "teacher", context=24)
    assert "more than the context of 24 of teacher.path=" in refused(lambda: preflight.check_files(kd))


def test_a_task_reward_alone_loads_no_teacher(setting: dict[str, str]) -> None:
    preflight.check_files(configured(setting, **GRPO, teacher__path="/no/where"))


# ---- answers to judge by ----


@pytest.mark.parametrize(
    ("changes", "asking"),
    [
        (GRPO, "loss.advantage.reward_coef=1"),
        (LIVE_TEACHER, "buffer.teacher_filter=correct"),
        (
            {"buffer__evidence__probes": "2", "buffer__golden_per_prompt": "0", "loss__golden__coef": "0"},
            "buffer.evidence",
        ),
    ],
)
def test_what_judges_responses_needs_answers(setting: dict[str, str], changes: dict[str, str], asking: str) -> None:
    preflight.check_files(configured(setting, **changes))
    prompts(setting, {"prompt": "1=", "answer": "1"}, {"prompt": "2="}, {"prompt": "3="})
    message = refused(lambda: preflight.check_files(configured(setting, **changes)))
    assert f"row 2: has no 'answer' (2 of 3 rows lack it), which {asking} needs" in message


def test_prompts_without_answers_do_where_nobody_judges(setting: dict[str, str]) -> None:
    prompts(setting, {"prompt": "1="})
    assert preflight.check_files(configured(setting)).num_prompts == 1
    preflight.check_files(configured(setting, **LIVE_TEACHER, buffer__teacher_filter="finished"))


@pytest.mark.slow
def test_answers_that_the_task_cannot_read_are_refused(setting: dict[str, str]) -> None:
    """The bug: the first response to such a problem ended a run whose models were long loaded."""
    mathematical, answer = GRPO | {"data__task": "math"}, "\\boxed{}"
    problems = Path(setting["data.evaluation"])
    write_jsonl(problems, [{"prompt": "5=", "answer": "5"}])
    prompts(setting, {"prompt": "1=", "answer": "1"}, {"id": "odd", "prompt": "2=", "answer": answer})
    message = refused(lambda: preflight.check_files(configured(setting, **mathematical)))
    assert "row 2 (id 'odd'): the task cannot read its answer" in message
    assert "data.prompts" in message
    preflight.check_files(configured(setting, data__task="math"))
    write_jsonl(problems, [{"id": "odd", "prompt": "5=", "answer": answer}])
    for check in (preflight.check_files, preflight.check_evaluation):
        message = refused(lambda check=check: check(configured(setting, data__task="math")))
        assert f"data.evaluation {problems} row 1 (id 'odd'): the task cannot read its answer" in message


# ---- sets of held-out problems ----


def with_sets(setting: dict[str, str], *names: str, **more: str) -> dict[str, str]:
    """The setting with a set for each name, whose file lies beside the others."""
    own = {name: value for name, value in setting.items() if name != "data.evaluation"}
    root = Path(setting["data.prompts"]).parent
    return own | {f"evaluation.sets.{name}.path": str(root / f"{name}.jsonl") for name in names} | more


@pytest.mark.slow
def test_every_set_is_looked_at_before_a_model_loads(setting: dict[str, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "easy.jsonl", [{"prompt": "5=", "answer": "5"}, {"prompt": "6=", "answer": "6"}])
    hard, both = tmp_path / "hard.jsonl", with_sets(setting, "easy", "hard")
    for check in (preflight.check_files, preflight.check_evaluation):
        hard.unlink(missing_ok=True)
        missing = f"evaluation.sets.hard.path {hard}: no such file"
        assert refused(lambda check=check: check(configured(both))).startswith(missing)
        write_jsonl(hard, [{"prompt": "7="}])
        assert f"{hard} row 1: has no 'answer'" in refused(lambda check=check: check(configured(both)))
        write_jsonl(hard, [{"prompt": "7=", "answer": "\\boxed{}"}])
        unreadable = refused(lambda check=check: check(configured(both, data__task="math")))
        assert f"evaluation.sets.hard.path {hard} row 1 (id '1'): the task cannot read its answer" in unreadable
        write_jsonl(hard, [{"prompt": "7=", "answer": "7"}])
        facts = check(configured(both))
        assert (facts.num_problems, list(facts.data.problem_streams())) == (3, ["easy", "hard"])
        more = configured(both | {"evaluation.sets.hard.num_problems": "2"})
        assert f"hard.num_problems=2, but evaluation.sets.hard.path {hard} has 1" in refused(
            lambda check=check, more=more: check(more)
        )


def test_a_set_s_own_budget_must_fit_beside_its_longest_problem(setting: dict[str, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "hard.jsonl", [{"prompt": "5=", "answer": "5"}])
    sets = with_sets(setting, "hard", **{"evaluation.sets.hard.max_tokens": "63"})
    message = refused(lambda: preflight.check_evaluation(configured(sets)))
    assert "its 2 prompt tokens + evaluation.sets.hard.max_tokens=63 are 65" in message
    assert message.endswith("set evaluation.sets.hard.max_tokens=62")
    sets["evaluation.sets.hard.max_tokens"] = "62"
    assert preflight.check_evaluation(configured(sets)).max_context_tokens == 64


def test_a_set_that_is_trained_on_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "easy.jsonl", [{"prompt": "5=", "answer": "5"}])
    write_jsonl(tmp_path / "hard.jsonl", [{"prompt": "12+1=", "answer": "13"}])
    message = refused(lambda: preflight.check_files(configured(with_sets(setting, "easy", "hard"))))
    assert message.startswith("evaluation.sets.hard.path") and "1 of 1 held-out problems are also in" in message


# ---- golden data beside the mixture ----


def test_golden_data_is_checked_where_the_guard_may_mix_it_in(setting: dict[str, str]) -> None:
    write_jsonl(Path(setting["data.golden"]), [{"prompt": "1=", "response": "1<eos>"}])
    without = {"buffer__golden_per_prompt": "0", "loss__golden__coef": "0"}
    message = refused(lambda: preflight.check_files(configured(setting, **without, guard__level="act")))
    assert "1 with an EOS inside (row 1)" in message
    facts = preflight.check_files(configured(setting, **without, guard__level="warn"))
    assert facts.golden == {}
