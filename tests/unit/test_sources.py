"""Lists of sources with weights, and prompts that are left out and counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opd_ray import config as configs
from opd_ray.data.dataset import Dataset
from opd_ray.data.orders import order_of
from opd_ray.data.rows import read_prompts
from opd_ray.run import preflight
from tiny_checkpoints import configured, make_setting, refused, write_jsonl

SKIP = {"data__prompt_problems": "skip"}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def file(path: Path, *prompts: str, **more: Any) -> str:
    return str(write_jsonl(path, [{"prompt": prompt, "answer": "0"} | more for prompt in prompts]))


# ---- lists ----


def test_a_list_reads_well_on_the_command_line_and_comes_back(setting: dict[str, str], tmp_path: Path) -> None:
    one, other = file(tmp_path / "one.jsonl", "1="), file(tmp_path / "other.jsonl", "2=", "3=")
    config = configured(setting, data__prompts=f"[{{source: {one}, weight: 2}}, {{source: {other}, weight: 1}}]")
    assert [(each.source, each.weight) for each in config.data.prompts] == [(one, 2.0), (other, 1.0)]
    assert configs.from_dict(configs.to_dict(config)) == config
    gym = "reasoning_gym:gcd?size=4&seed=1"
    plain = configured(setting, data__prompts=f"[{one}, {gym}]", data__task="module:Class")
    assert configs.written(plain.data.prompts) == f"{one}, {gym}"


def test_rows_of_several_sources_are_told_apart(tmp_path: Path) -> None:
    one, other = file(tmp_path / "one.jsonl", "1=", "2="), file(tmp_path / "other.jsonl", "3=")
    rows = read_prompts((one, other))
    assert [(row["id"], row["prompt"]) for row in rows] == [("1-1", "1="), ("1-2", "2="), ("2-1", "3=")]
    same = [file(tmp_path / f"{name}.jsonl", "1=", id="x") for name in "ab"]
    assert refused(lambda: read_prompts(tuple(same))).startswith(
        f"{same[1]} row 1: id 'x' is also that of row 1 of {same[0]}"
    )


def test_weights_decide_the_share_of_prompts(setting: dict[str, str], tmp_path: Path) -> None:
    one, other = file(tmp_path / "one.jsonl", "1="), file(tmp_path / "other.jsonl", *(f"{i}+1=" for i in range(9)))
    weighted = f"[{{source: {one}, weight: 1}}, {{source: {other}, weight: 1}}]"
    stream = Dataset(configured(setting, data__prompts=weighted)).prompt_stream(0)
    asked = Counter(stream[slot].row["prompt"] == "1=" for slot in range(30))
    assert asked == {True: 15, False: 15}
    stream = Dataset(configured(setting, data__prompts=f"[{one}, {other}]")).prompt_stream(0)
    assert len({stream[slot].prompt_id for slot in range(10)}) == 10, "without weights every row once"


def test_weights_decide_the_share_of_golden_solutions(setting: dict[str, str], tmp_path: Path) -> None:
    one = file(tmp_path / "one.jsonl", "1=", response="1")
    other = file(tmp_path / "other.jsonl", *(f"{i}+1=" for i in range(8)), "3+3=", response="2")
    weighted = f"[{{source: {one}, weight: 1}}, {{source: {other}, weight: 1}}]"
    config = configured(setting, data__golden=weighted, data__golden_problems="skip")
    golden = preflight.check_files(config).data.golden
    assert golden.report["held_out"] == 1, "3+3= is asked by the evaluation"
    order = order_of(len(golden.solutions), golden.mix, seed=1, shuffle=True)
    asked = Counter(golden.solutions[order[i]].row["prompt"] == "1=" for i in range(90))
    assert asked == {True: 50, False: 40}, "4.5 of 9, rounded, in each of ten epochs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__prompts": "[]"}, "config: data: prompts is an empty list; give a source"),
        ({"data__prompts": "[{source: a, weight: 1}, b]"}, "data: prompts has a source with a weight; give all of its"),
        ({"data__evaluation": "[{source: a, weight: 1}]"}, "data: evaluation has a source with a weight; all of its"),
        (
            {"data__golden": "[{source: a, weight: 1}]", "buffer__golden_pairing": "prompt"},
            "data.golden has weights, but buffer.golden_pairing=prompt takes the solutions of the step's prompts",
        ),
        (
            {"data__prompts": "[{source: a, weight: 0}]"},
            "config: data.prompts.0.weight: Input should be greater than 0, got 0",
        ),
        ({"data__prompts": "[{path: a}]"}, "config: data.prompts.0.source: "),
        ({"data__prompts": "3"}, "config: data.prompts: Input should be a valid string, got 3"),
    ],
)
def test_lists_that_mean_nothing_are_refused(setting: dict[str, str], change: dict[str, str], message: str) -> None:
    assert message in refused(lambda: configured(setting, **change))


def test_a_weighted_source_of_which_nothing_is_left_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    one, other = file(tmp_path / "one.jsonl", "3+3="), file(tmp_path / "other.jsonl", "2=")
    weighted = f"[{{source: {one}, weight: 1}}, {{source: {other}, weight: 1}}]"
    config = configured(setting, data__prompts=weighted, **SKIP)
    assert "source 1 of 2 has a weight, but no row of it is left" in refused(lambda: preflight.check_files(config))


# ---- prompts that are left out ----


def test_prompts_over_length_and_held_out_ones_are_left_out_and_counted(
    setting: dict[str, str], tmp_path: Path
) -> None:
    prompts = file(tmp_path / "p.jsonl", "1=", "1" * 45, "3+3=", "2=", "1" * 44)
    message = refused(lambda: preflight.check_files(configured(setting, data__prompts=prompts)))
    assert "leave them out of the prompts with data.prompt_problems=skip" in message
    facts = preflight.check_files(configured(setting, data__prompts=prompts, **SKIP))
    assert facts.prompts == {"rows": 5, "used": 3, "held_out": 1, "over_length": 1, "unsolved": 0}
    assert list(facts.data.remarks()) == [
        "prompts: 3 of 5 rows are used; left out: 1 held out, 1 over length",
        "prompts: a step takes 64, but there are 3 rows: some are in it more than once",
        "golden: a step takes 64, but there are 1 rows: some are in it more than once",
        f"data.evaluation {setting['data.evaluation']}: has 1 problems, fewer than num_problems=512; all are used",
    ]
    stream = facts.data.prompt_stream(0)
    assert {stream[slot].prompt_id for slot in range(3)} == {"1", "4", "5"}
    assert facts.max_prompt_tokens == 44


def test_long_prompts_are_refused_with_the_way_out(setting: dict[str, str], tmp_path: Path) -> None:
    config = configured(setting, data__prompts=file(tmp_path / "p.jsonl", "1=", "1" * 45))
    assert "or leave out such prompts with data.prompt_problems=skip" in refused(lambda: preflight.check_files(config))


def test_prompts_without_the_solution_that_they_need_are_left_out(setting: dict[str, str], tmp_path: Path) -> None:
    """OpenR1 as prompts and golden solutions: a problem whose generations are all too long is in neither."""
    rows = [
        {"prompt": "1=", "response": "1"},
        {"prompt": "2=", "response": "2" * 30},
        {"prompt": "4=", "response": "4"},
    ]
    source = str(write_jsonl(tmp_path / "both.jsonl", rows))
    both = {"data__prompts": source, "data__golden": source, "data__golden_problems": "skip"}
    config = configured(setting, **both, buffer__golden_pairing="prompt", **SKIP)
    facts = preflight.check_files(config)
    assert facts.prompts["unsolved"] == facts.golden["over_length"] == 1
    assert facts.data.golden.pairs == {"1": 0, "3": 1}
    shown = preflight.check_files(configured(setting, **both, **SKIP, teacher__privileged="true")).data
    stream = shown.prompt_stream(0)
    assert {stream[slot].prompt_id for slot in range(2)} == {"1", "3"}
    assert all(stream[slot].privileged_prompt_tokens for slot in range(2))


def test_leaving_out_all_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    config = configured(setting, data__prompts=file(tmp_path / "p.jsonl", "3+3=", "1" * 50), **SKIP)
    message = refused(lambda: preflight.check_files(config))
    assert message.endswith("no prompt is left to train on; the last 1 of 2 are out as over length")
