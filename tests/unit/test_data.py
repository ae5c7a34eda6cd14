"""Prompt files: what is read, and that a bad one is refused by file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.data.rows import read_golden, read_prompts
from opd_ray.errors import InputError
from tiny_checkpoints import write_jsonl

GOOD = {"prompt": "1+1=", "answer": "2"}


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [GOOD | {"id": "first", "response": "2"}, {"prompt": "2+2=", "answer": 4, "response": "4", "more": [1]}]
    jsonl = write_jsonl(tmp_path / "golden.jsonl", rows)
    columns = [{key: str(value) for key, value in row.items() if key != "more"} for row in rows]
    pq.write_table(pa.Table.from_pylist(columns), tmp_path / "golden.parquet")
    expected = [
        {"id": "first", "prompt": "1+1=", "answer": "2", "response": "2"},
        {"id": "2", "prompt": "2+2=", "answer": "4", "response": "4"},
    ]
    assert read_golden(str(jsonl)) == expected
    assert read_golden(str(tmp_path / "golden.parquet")) == expected


def test_golden_rows_need_no_answer_and_blank_lines_may_end_a_file(tmp_path: Path) -> None:
    file = tmp_path / "golden.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n\n \n')
    assert read_golden(str(file)) == [{"id": "1", "prompt": "p", "answer": "", "response": "r"}]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("not json", "row 2: not JSON"),
        ("[1, 2]", "row 2: expected an object with a 'prompt', got a list"),
        ("null", "row 2: expected an object with a 'prompt', got null"),
        ('{"answer": "2"}', "row 2: has no 'prompt' (it has: answer)"),
        ('{"prompt": "", "answer": "2"}', "row 2: 'prompt' is empty"),
        ('{"prompt": ["1"], "answer": "2"}', "row 2: 'prompt' is a list, expected a string"),
        ('{"prompt": 5, "answer": "2"}', "row 2: 'prompt' is the number 5, expected a string"),
        ('{"prompt": "1"}', "row 2: has no 'answer'"),
        ('{"prompt": "1", "answer": true}', "row 2: 'answer' is true, expected a string"),
        ('{"prompt": "1", "answer": "2", "id": 1.5}', "row 2: 'id' is the number 1.5"),
        ('{"prompt": "1", "answer": "2", "id": "1"}', "row 2: id '1' is also that of row 1"),
        ('{"prompt": "1", "answer": "2", "prompt": "3"}', "row 2: has 'prompt' twice"),
        ('{"prompt": "1", "answer": "2", "more": [{"a": 1, "a": 1}]}', "row 2: has 'a' twice"),
        ('{"prompt": "1", "answer": NaN}', "row 2: 'answer' is nan, expected a string or a number"),
        ('{"prompt": "1", "answer": -Infinity}', "row 2: 'answer' is -inf, expected a string or a number"),
        ("", "row 2: is blank"),
        ("\xff", "row 2: is not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_number(tmp_path: Path, second: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(good + b"\n" + second.encode("latin-1") + b"\n" + good + b"\n")
    with pytest.raises(InputError) as caught:
        read_prompts(str(file))
    assert str(caught.value).startswith(f"{file} {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("response", [None, "", 7])
def test_a_golden_row_needs_a_response(tmp_path: Path, response: object) -> None:
    file = write_jsonl(tmp_path / "golden.jsonl", [GOOD | ({} if response is None else {"response": response})])
    with pytest.raises(InputError, match=r"golden.jsonl row 1: .*'response'"):
        read_golden(str(file))


def test_a_teacher_is_passed_on_and_an_answer_may_be_missing_where_none_is_needed(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "teacher": "code"}, GOOD]
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    assert read_prompts(str(file), need_answer=False) == [
        {"id": "1", "prompt": "1", "answer": "", "teacher": "code"},
        {"id": "2", "prompt": "1+1=", "answer": "2"},
    ]
    with pytest.raises(InputError, match="row 1: has no 'answer'"):
        read_prompts(str(file))
    write_jsonl(file, [GOOD | {"teacher": ["code"]}])
    with pytest.raises(InputError, match="row 1: 'teacher' is a list, expected a string"):
        read_prompts(str(file))


def test_rows_know_whether_they_all_brought_an_id(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "prompts.jsonl", [GOOD | {"id": "a"}, GOOD | {"id": 5}])
    assert read_prompts(str(file)).has_ids
    write_jsonl(file, [GOOD | {"id": "a"}, GOOD])
    assert not read_prompts(str(file)).has_ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("prompts.csv", b"prompt,answer\n", "expected .jsonl or .parquet"),
        ("prompts", b"{}\n", "expected .jsonl or .parquet"),
        ("prompts.parquet", b'{"prompt": "1"}\n', "is not a Parquet file"),
        ("prompts.jsonl", b"PAR1....", "is a Parquet file"),
        ("cut.parquet", b"PAR1....", "cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(str(file))
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_nulls_and_missing_columns_are_missing_values(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["1", None], "answer": ["1", "2"]}), tmp_path / "nulls.parquet")
    with pytest.raises(InputError, match="row 2: has no 'prompt'"):
        read_prompts(str(tmp_path / "nulls.parquet"))
    pq.write_table(pa.table({"prompt": ["1"], "answer": [float("nan")]}), tmp_path / "nan.parquet")
    with pytest.raises(InputError, match="row 1: 'answer' is nan"):
        read_prompts(str(tmp_path / "nan.parquet"))
    pq.write_table(pa.table({"query": ["1"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"row 1: has no 'prompt' \(it has: query\); .* data.columns={prompt: NAME}"):
        read_prompts(str(tmp_path / "other.parquet"))
