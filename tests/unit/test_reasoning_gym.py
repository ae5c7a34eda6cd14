"""Problems that reasoning-gym makes up: as prompts, as golden solutions, and judged by its verifiers."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from opd_ray import config as configs
from opd_ray.data.rows import read_golden, read_prompts
from opd_ray.run import preflight
from opd_ray.tasks import get_task, reasoning_gym
from opd_ray.tasks.judge import Judge
from tiny_checkpoints import configured, make_setting, refused

GCD = "reasoning_gym:gcd?size=4&seed=1"


@pytest.mark.slow
def test_a_source_gives_prompts_answers_and_solutions_by_its_seed() -> None:
    rows = read_prompts(GCD)
    assert len(rows) == 4 and rows.has_ids
    assert rows[0]["id"] == "gcd?size=4&seed=1#0"
    assert rows[0]["prompt"].startswith("Find the Greatest Common Divisor (GCD) of these numbers: ")
    golden = read_golden(GCD)
    assert [row["response"] for row in golden] == [row["answer"] for row in rows]
    assert [row["prompt"] for row in read_prompts(GCD)] == [row["prompt"] for row in rows]
    assert read_prompts("reasoning_gym:gcd?size=4&seed=2")[0]["prompt"] != rows[0]["prompt"]
    assert read_prompts("reasoning_gym:gcd?size=1") == read_prompts("reasoning_gym:gcd?size=1"), "no seed is seed 0"


def test_sources_of_two_seeds_are_two_samples() -> None:
    """The bug: the library draws problem i with seed + i, and of two neighbouring seeds all problems but one were the
    same."""
    one, other = ({row["prompt"] for row in read_prompts(f"reasoning_gym:gcd?size=50&seed={seed}")} for seed in (1, 2))
    assert len(one & other) < 5


def test_settings_reach_the_dataset() -> None:
    [row] = read_prompts("reasoning_gym:chain_sum?size=1&min_terms=7&max_terms=7&allow_negation=true")
    assert row["entry"]["metadata"]["num_terms"] == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:gdc", "reasoning-gym has no dataset 'gdc'; did you mean 'gcd'?"),
        ("reasoning_gym:gcd?sice=3", "gcd has no setting 'sice'; did you mean 'size'?"),
        ("reasoning_gym:gcd?min_value=0", "reasoning-gym refuses these settings (min_value must be positive)"),
        ("reasoning_gym:gcd?size=0", "reasoning-gym refuses these settings ("),
        ("reasoning_gym:gcd?size=[3", "its setting size=[3 is no value ("),
        ("reasoning_gym:gcd?size=%00", "its setting size=\x00 is no value ("),
        ("reasoning_gym:gcd?seed={[1]: 2}", "its setting seed={[1]: 2} is no value ("),
        ("reasoning_gym:gcd?size=2026-13-01", "its setting size=2026-13-01 is no value ("),
        ("reasoning_gym:gcd?min_value=many", "reasoning-gym refuses these settings ("),
    ],
)
def test_what_the_library_does_not_have_is_refused(source: str, message: str) -> None:
    assert refused(lambda: read_prompts(source)).startswith(f"{source}: {message}")


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("{}", True),
        (" {}\n", True),
        ("<think>\nmaybe 999\n</think>\n\n{}", True),
        ("first <answer>999</answer>, no: <answer> {} </answer>.", True),
        ("<answer>{}</answer> or <answer>999</answer>", False),
        ("The GCD is {}", False),
        ("", False),
    ],
)
def test_the_librarys_own_score_of_the_final_answer_decides(response: str, right: bool) -> None:
    row = read_prompts(GCD)[0]
    assert get_task("reasoning_gym").verify(response.format(row["answer"]), row) is right


def test_a_problem_with_many_right_answers_is_judged_by_its_rules_and_has_no_solution() -> None:
    row = read_prompts("reasoning_gym:graph_color?size=1")[0]
    graph = row["entry"]["metadata"]["possible_answer"]
    assert get_task("reasoning_gym").verify(json.dumps(graph), row)
    assert "row 1: has no 'response'" in refused(lambda: read_golden("reasoning_gym:graph_color?size=1"))


@pytest.mark.slow
def test_verdicts_come_from_a_process_that_can_be_killed() -> None:
    """The row and what its verifier needs go there by pickle."""
    rows = read_prompts(GCD)
    assert pickle.loads(pickle.dumps(rows)) == rows
    with Judge(get_task("reasoning_gym")) as judge:
        assert judge.ask("verify", [(rows[0]["answer"], rows[0])]) == [True]


def test_the_task_follows_from_the_source() -> None:
    given = {"student": {"path": "/s"}, "teacher": {"path": "/t"}, "data": {"prompts": GCD, "evaluation": GCD}}
    assert configs.from_dict(given).data.task == "reasoning_gym"
    own = given | {"data": given["data"] | {"task": "module:Class"}}
    assert configs.from_dict(own).data.task == "module:Class"
    sets = {"student": {"path": "/s"}, "evaluation": {"sets": {"gcd": {"path": ["reasoning_gym:gcd"]}}}}
    assert configs.load(sections=sets, evaluation_only=True).data.task == "reasoning_gym"
    unasked = given | {"data": {"prompts": "p", "evaluation": GCD}, "evaluation": {"num_problems": 0}}
    assert configs.from_dict(unasked).data.task == "math"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data__prompts": GCD}, "data.prompts"),
        ({"data__prompts": f"[p.jsonl, {GCD}]"}, "data.prompts"),
        ({"data__evaluation": f"[e.jsonl, {GCD}]"}, "data.evaluation"),
        (
            {"data__evaluation": "embedded", "evaluation__sets": f"{{a: {{path: [x, {GCD}]}}}}"},
            "evaluation.sets.a.path",
        ),
        ({"data__golden": f"[g.jsonl, {GCD}]", "data__golden_filter": "correct"}, "data.golden"),
    ],
)
def test_what_its_verifiers_judge_is_judged_by_no_other_task(
    tmp_path: Path, changes: dict[str, str], field: str
) -> None:
    """The bug: of a list only the first source was looked at, and of data.evaluation none."""
    setting = make_setting(tmp_path)
    message = refused(lambda: configured(setting, data__task="math", **changes))
    assert message.startswith(f"config: {field} has {GCD}, which its own verifier judges, but data.task is math: set")
    configured(setting, data__task="module:Class", **changes)


def test_its_verifier_is_not_asked_about_problems_of_others(tmp_path: Path) -> None:
    """The bug: of a list with a file in it, every response to the file's problems was judged wrong."""
    setting = make_setting(tmp_path)
    mixed = configured(setting, data__task="reasoning_gym", data__prompts=f"[{GCD}, {setting['data.prompts']}]")
    assert "row 5: 2 of 6 rows are none of reasoning_gym's" in refused(lambda: preflight.check_files(mixed))
    problems = configured(setting, data__task="reasoning_gym", data__prompts=GCD)
    assert "data.evaluation" in refused(lambda: preflight.check_files(problems))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    reasoning_gym._dataset.cache_clear()
    assert "pip install 'opd_ray[gym]'" in refused(lambda: read_prompts(GCD))
