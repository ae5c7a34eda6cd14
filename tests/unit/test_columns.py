"""Columns of others: mapped or known names, conversations, and OpenR1's generations, down to what is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.config import Config
from opd_ray.data.dataset import Dataset
from opd_ray.data.rows import read_golden, read_prompts
from opd_ray.models.checkpoints import inspect_run
from opd_ray.run import preflight
from opd_ray.tasks.judge import Judge
from tiny_checkpoints import configured, encode, make_setting, refused, write_jsonl


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def openr1(problem: str, answer: str, *generations: tuple[str, bool, bool]) -> dict[str, Any]:
    """A row of OpenR1-Math-220k; generations are (text, verified, complete)."""
    texts, verified, complete = map(list, zip(*generations, strict=True))
    return {
        "problem": problem,
        "solution": "a person's",
        "answer": answer,
        "problem_type": "Algebra",
        "source": "olympiads",
        "uuid": "u",
        "is_reasoning_complete": complete,
        "generations": texts,
        "correctness_math_verify": verified,
        "correctness_llama": None,
        "finish_reasons": None,
        "messages": [user(problem), assistant(texts[0])],
    }


OPENR1 = [
    openr1("1+1=", "2", ("1+1=3", False, True), ("1+1=2", True, True), ("1+1=1+1=2", True, True)),
    openr1("2+2=", "4", ("2+2=4", True, True), ("4", True, False)),
]


def trained(config: Config) -> tuple[list[str], dict[str, int]]:
    """The golden responses' texts, as a run gets them, and the counts."""
    data = Dataset(config)
    with Judge(data.renderer.task) as judge:
        data.read_golden(inspect_run(config), (1, 2), judge)
    report = data.golden.report
    return data.golden.hand_over()[1]["text"].to_pylist(), report


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


# ---- names ----


def test_columns_are_mapped_where_a_source_has_them(tmp_path: Path) -> None:
    columns = {"prompt": "query", "answer": "target", "response": "worked"}
    mapped = write_jsonl(tmp_path / "a.jsonl", [{"query": "1+1=", "target": 2, "worked": "2", "prompt": "unused"}])
    assert read_golden(str(mapped), columns) == [{"id": "1", "prompt": "1+1=", "answer": "2", "response": "2"}]
    plain = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "1+1=", "answer": "2", "query": None}])
    assert read_prompts(str(plain), columns=columns) == [{"id": "1", "prompt": "1+1=", "answer": "2"}]


@pytest.mark.parametrize("name", ["problem", "question"])
def test_usual_names_are_known(tmp_path: Path, name: str) -> None:
    rows = [{name: "1+1=", "answer": "2"}]
    for source in (str(write_jsonl(tmp_path / "a.jsonl", rows)), parquet(tmp_path / "a.parquet", rows)):
        assert read_prompts(source) == [{"id": "1", "prompt": "1+1=", "answer": "2"}]


def test_a_name_that_nobody_reads_is_refused(setting: dict[str, str]) -> None:
    message = refused(lambda: configured(setting, data__columns="{promt: query}"))
    assert message == "config: data: columns.promt is no column that is read; did you mean 'prompt'?"


def test_a_task_of_ones_own_gets_further_columns(setting: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2", "unit_tests": [{"in": 1}], "unused": 3}]
    for source in (str(write_jsonl(tmp_path / "a.jsonl", rows)), parquet(tmp_path / "a.parquet", rows)):
        config = configured(setting, data__task="module:Class", data__columns="{tests: unit_tests}")
        [row] = read_prompts(source, columns=config.data.columns)
        assert row == {"id": "1", "prompt": "1+1=", "answer": "2", "tests": [{"in": 1}]}


@pytest.mark.parametrize("write", [write_jsonl, parquet])
def test_columns_with_the_names_of_what_rows_have_inside_are_not_read(
    setting: dict[str, str], tmp_path: Path, write: Callable[..., Any]
) -> None:
    """The bug: a column called before was taken for turns, responses for generations, and entry for reasoning-gym's."""
    inner = {"before": "noon", "responses": ["5"], "others": ["6"], "gym": "Fit", "entry": "left"}
    row = {"id": "1", "prompt": "1+1=", "answer": "2"}
    source = str(
        write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", [row | {"response": "2"} | inner])
    )
    assert read_prompts(source) == [row]
    assert read_golden(source) == [row | {"response": "2"}]
    config = configured(setting, data__prompts=source, data__golden=source, buffer__golden_pairing="prompt")
    assert trained(config)[0] == ["2"]


def test_a_task_of_ones_own_gets_no_column_under_a_name_of_the_rows_own(setting: dict[str, str]) -> None:
    own = {"data__task": "module:Class", "data__columns": "{before: history}"}
    message = refused(lambda: configured(setting, **own))
    assert message == "config: data: columns.before is a name that rows have for something else; choose another"


@pytest.mark.parametrize("write", [write_jsonl, parquet])
def test_a_mapped_column_that_no_source_has_is_refused(
    setting: dict[str, str], tmp_path: Path, write: Callable[..., Any]
) -> None:
    """The bug: a mistyped name changed nothing, and nobody said so."""
    path = tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}"
    source = str(write(path, [{"prompt": "1=", "anwser": "1", "target": "1"}]))
    golden = str(write_jsonl(tmp_path / "g.jsonl", [{"prompt": "5=", "worked": "5"}]))
    both = {"data__prompts": source, "data__golden": golden}
    preflight.check_files(configured(setting, **both, data__columns="{response: worked, answer: target}"))
    mistyped = configured(setting, **both, data__columns="{response: worked, answer: traget}")
    message = refused(lambda: preflight.check_files(mistyped))
    assert message == (
        "data.columns.answer: no source has a column 'traget' (they have: answer, anwser, prompt, target, worked); "
        "mend it"
    )


# ---- OpenR1 ----


def test_the_shortest_generation_that_is_verified_and_complete_is_taken(
    setting: dict[str, str], tmp_path: Path
) -> None:
    source = parquet(tmp_path / "openr1.parquet", OPENR1)
    config = configured(setting, data__prompts=source, data__golden=source, buffer__golden_pairing="prompt")
    texts, report = trained(config)
    assert texts == ["1+1=2", "2+2=4"]
    assert report["used"] == 2
    facts = preflight.check_files(config)
    assert facts.num_prompts == 2 and facts.data.golden.pairs == {"1": 0, "2": 1}
    row = facts.data.prompt_stream(0)[0].row
    assert set(row) == {"id", "prompt", "answer"}, "generators are sent what the task needs, and no generations"
    assert all("others" not in each.row for each in facts.data.golden.solutions)


def test_the_next_one_is_taken_where_the_shortest_cannot_be_trained_on(setting: dict[str, str], tmp_path: Path) -> None:
    long = "1" * 30
    rows = [
        openr1("1+1=", "2", ("1<eos>", True, True), ("1+1=2", True, True), (long, True, True)),
        openr1("2+2=", "4", (long, True, True), ("4", False, True)),
        openr1("3+1=", "4", ("3+1=5", False, True)),
    ]
    source = parquet(tmp_path / "openr1.parquet", rows)
    message = refused(lambda: trained(configured(setting, data__golden=source)))
    assert (
        "2 of 3 rows cannot be trained on: 1 without a response that is marked as right and complete (row 3)" in message
    )
    assert "1 over length (row 2)" in message
    texts, report = trained(configured(setting, data__golden=source, data__golden_problems="skip"))
    assert texts == ["1+1=2"]
    assert (report["used"], report["unverified"], report["over_length"]) == (1, 1, 1)


def test_the_verifier_may_choose_among_generations(setting: dict[str, str], tmp_path: Path) -> None:
    """Of a file that has no marks."""
    rows = [{"problem": "1+1=", "answer": "2", "generations": ["#3", "1+1=2#2"]}]
    source = str(write_jsonl(tmp_path / "many.jsonl", rows))
    config = configured(setting, data__golden=source, data__golden_filter="correct")
    with Judge(EndsWithAnswer()) as judge:
        data = Dataset(config)
        data.read_golden(inspect_run(config), (1, 2), judge)
    assert [solution.text for solution in data.golden.solutions] == ["1+1=2#2"]


class EndsWithAnswer:
    verify_limit_s = None

    def verify(self, response: str, row: Any) -> bool:
        return response.endswith(row["answer"])


def test_marks_of_another_number_are_refused(tmp_path: Path) -> None:
    row = OPENR1[0] | {"correctness_math_verify": [True]}
    source = str(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert "row 1: has 3 generations, expected as many values in" in refused(lambda: read_golden(source))


def test_a_mapped_response_comes_before_generations(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", OPENR1[:1]))
    assert read_golden(source, {"response": "solution"})[0]["response"] == "a person's"


# ---- conversations ----

TURNS = [{"role": "system", "content": "0"}, user("1="), assistant("1"), user("1+1=")]


def test_messages_are_prompt_and_response(tmp_path: Path) -> None:
    source = parquet(tmp_path / "chat.parquet", [{"messages": [user("1+1="), assistant("2")], "answer": "2"}])
    assert read_prompts(source) == [{"id": "1", "prompt": "1+1=", "answer": "2"}]
    assert read_golden(source) == [{"id": "1", "prompt": "1+1=", "answer": "2", "response": "2"}]


def test_what_was_said_before_goes_before_the_prompt(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": [*TURNS, assistant("2")]}]))
    [row] = read_golden(source)
    assert (row["prompt"], row["before"], row["response"]) == ("1+1=", TURNS[:3], "2")


def test_a_prompt_and_a_completion_may_be_conversations(tmp_path: Path) -> None:
    """As TRL has them."""
    source = str(write_jsonl(tmp_path / "chat.jsonl", [{"prompt": TURNS, "completion": [assistant("2")]}]))
    [row] = read_golden(source)
    assert (row["prompt"], row["before"], row["response"]) == ("1+1=", TURNS[:3], "2")
    assert read_prompts(source, need_answer=False)[0]["prompt"] == "1+1="


@pytest.mark.parametrize(
    "turns",
    [
        [user("1+1="), assistant("2")],
        [{"role": "system", "content": "0"}, assistant("2")],
        [user("2")],
        [assistant("1"), assistant("2")],
    ],
)
@pytest.mark.parametrize("columns", [{}, {"response": "messages"}])
def test_a_response_is_one_turn_of_the_assistant(tmp_path: Path, turns: Any, columns: dict[str, str]) -> None:
    """The bug: of a conversation that was taken as the response, the question was trained on as well."""
    row = {"prompt": "1+1=", columns.get("response", "completion"): turns}
    source = str(write_jsonl(tmp_path / "chat.jsonl", [{"prompt": "1=", "response": "1"}, row]))
    message = refused(lambda: read_golden(source, columns))
    said = (
        f"{source} row 2: its response is a conversation of {', '.join(turn['role'] for turn in turns)}, expected one"
    )
    assert message.startswith(said) and "messages" in message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([assistant("2")], "'messages' has no turn of the user's that the response answers"),
        ([user("1="), {"role": "system", "content": "x"}], "'messages' has no turn of the user's that the response"),
        ([{"role": "user"}], "turn 1 of 'messages' has role, expected role and content as text"),
        ([user("1="), {"role": "assistant", "content": None, "tool_calls": []}], "turn 2 of 'messages' has role, "),
    ],
)
def test_conversations_that_cannot_be_asked_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    source = str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}]))
    assert message in refused(lambda: read_prompts(source, need_answer=False))


def test_conversations_are_trained_on(setting: dict[str, str], tmp_path: Path) -> None:
    """A base model reads the turns one after the other."""
    rows = [{"messages": [user("1="), assistant("1"), user("1+1="), assistant("2")]}]
    source = parquet(tmp_path / "chat.parquet", rows)
    config = configured(setting, data__prompts=source, data__golden=source, buffer__golden_pairing="prompt")
    facts = preflight.check_files(config)
    # The tiny tokenizer does not know the blank line and reads <pad> (0) there.
    expected = [*encode("1="), 0, *encode("1"), 0, *encode("1+1=")]
    assert facts.data.prompt_stream(0)[0].prompt_tokens == tuple(expected)
    assert facts.data.golden.hand_over()[1]["text"].to_pylist() == ["2"]


def test_the_same_last_turn_of_two_conversations_is_no_held_out_problem(setting: dict[str, str]) -> None:
    held_out = Path(setting["data.evaluation"])
    write_jsonl(held_out, [{"messages": [user("7="), assistant("7"), user("1+1=")], "answer": "2"}])
    preflight.check_files(configured(setting))
    write_jsonl(held_out, [{"messages": [{"role": "system", "content": "0"}, user("1+1=")], "answer": "2"}])
    assert "1 of 1 held-out problems are also in" in refused(lambda: preflight.check_files(configured(setting)))
