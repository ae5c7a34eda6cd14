"""Prompt, golden and evaluation files: JSONL or Parquet in, checked rows out.

A row that cannot be used is refused here, with file and row, before a model loads; nothing is
skipped silently. This module knows no tokenizer and no task; see :mod:`opd_ray.run.preflight` for lengths
and :mod:`opd_ray.data.golden` for what else a golden solution must be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.errors import InputError

_PROMPT_COLUMNS = ("id", "prompt", "answer", "teacher")
_GOLDEN_TEXT_COLUMNS = ("prompt_id", "response", "finish_reason", "correct", "text")
_TOKEN_COLUMNS = ("prompt_tokens", "response_tokens")
_PARQUET_MAGIC = b"PAR1"


class Rows(list[dict[str, Any]]):
    """The rows of a file, in its order: row i here is row i + 1 of the file."""

    has_ids: bool = True
    """Did every row bring an id of its own? Where one did not, its id is its row number."""


def read_prompts(path: str, need_answer: bool = True) -> Rows:
    """The rows of a prompt file, each with the keys id, prompt and answer, and teacher if the row names one.

    All of them are strings (numbers become strings). ``id`` defaults to the row number. Without
    ``need_answer`` a row may lack its answer, which is then "". Raises InputError naming file and row.
    """
    return _checked(path, _PROMPT_COLUMNS, lambda where, row: _prompt(where, row, need_answer))


def read_golden(path: str) -> Rows:
    """The rows of a golden file, as text or as tokens.

    A text row has a prompt and a non-empty response. A token row, as in a rollout log, has prompt_tokens and
    response_tokens (integer arrays); its id is prompt_id, which may occur more than once, and its prompt is ""
    unless given. Both may have answer (else ""), teacher, finish_reason, correct (bool) and text (string); keys
    of absent values are absent. Raises InputError naming file and row.
    """
    return _checked(path, (*_PROMPT_COLUMNS, *_GOLDEN_TEXT_COLUMNS, *_TOKEN_COLUMNS), _golden)


def _checked(path: str, columns: Sequence[str], check: Any) -> Rows:
    rows, first_use = Rows(), {}
    for number, raw in _read(Path(path), columns):
        where = f"{path} row {number}"
        if not isinstance(raw, dict):
            raise InputError(f"{where}: expected an object with a 'prompt', got {_kind(raw)}")
        row = check(where, raw)
        given = _id(where, raw, row)
        rows.has_ids = rows.has_ids and given is not None
        name = row["id"] = str(number) if given is None else given
        if name in first_use and "response_tokens" not in row:
            raise InputError(
                f"{where}: id {name!r} is also that of row {first_use[name]}; "
                "make ids unique, or leave them out to use row numbers"
            )
        first_use[name] = number
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: has no rows; give a file with one problem per row")
    return rows


def _read(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Row numbers and unchecked rows, by suffix, once the content has been found to agree with it."""
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; give a JSONL or Parquet file of prompts")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".parquet"):
        raise InputError(f"{path}: the name ends in {suffix or 'no suffix'!r}, expected .jsonl or .parquet")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_PARQUET_MAGIC))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not magic:
        raise InputError(f"{path}: is empty; give a file with one problem per row")
    if (magic == _PARQUET_MAGIC) != (suffix == ".parquet"):
        found = "is a Parquet file" if magic == _PARQUET_MAGIC else "is not a Parquet file"
        raise InputError(f"{path}: {found}, but its name ends in {suffix}; rename or convert it")
    return _read_parquet(path, columns) if suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    blank = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:  # blank lines at the end are no rows; elsewhere they would shift the numbers of rows
                raise InputError(f"{path} row {blank}: is blank; remove the line")
            try:
                yield number, json.loads(line)
            except UnicodeDecodeError as error:
                raise InputError(f"{path} row {number}: is not UTF-8 text ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} row {number}: not JSON ({error.msg} at column {error.colno}); "
                    'expected one object per line, like {"prompt": "...", "answer": "..."}'
                ) from None


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(path)
        there = [name for name in columns if name in file.schema_arrow.names]
        tokens = [name for name in there if name in _TOKEN_COLUMNS]
        number = 0
        for batch in file.iter_batches(columns=there):
            rows = batch.select([name for name in there if name not in tokens]).to_pylist() or [{} for _ in batch]
            for name in tokens:
                for row, scalar in zip(rows, batch[name], strict=True):
                    row[name] = _token_array(path, name, scalar)
            for row in rows:
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: Parquet that cannot be read ({' '.join(str(error).split())})") from None


def _token_array(path: Path, name: str, scalar: pa.Scalar) -> np.ndarray | None:
    """A cell of a token column without going through Python numbers, which long ones would be too many of."""
    kind = scalar.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise InputError(f"{path}: column '{name}' holds {kind}, expected lists of integers (token ids)")
    return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None


def _prompt(where: str, raw: dict[str, Any], need_answer: bool, need_prompt: bool = True) -> dict[str, Any]:
    given = {name for name in ("prompt", "answer") if raw.get(name) is not None}
    row = {"id": "", "prompt": _text(where, raw, "prompt") if need_prompt or "prompt" in given else ""}
    row["answer"] = _text(where, raw, "answer", numbers=True) if need_answer or "answer" in given else ""
    if raw.get("teacher") is not None:
        row["teacher"] = _text(where, raw, "teacher")
    return row


def _golden(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    as_tokens = raw.get("response_tokens") is not None
    row = _prompt(where, raw, need_answer=False, need_prompt=not as_tokens)
    if as_tokens:
        row |= {name: _tokens(where, raw, name) for name in _TOKEN_COLUMNS}
        row |= {"text": raw["text"]} if isinstance(raw.get("text"), str) else {}
    else:
        row["response"] = _text(where, raw, "response")
    if raw.get("finish_reason") is not None:
        row["finish_reason"] = _text(where, raw, "finish_reason")
    if (verdict := raw.get("correct")) is not None:
        if not isinstance(verdict, bool):
            raise InputError(f"{where}: 'correct' is {_kind(verdict)}, expected true or false")
        row["correct"] = verdict
    return row


def _id(where: str, raw: dict[str, Any], row: dict[str, Any]) -> str | None:
    """The id that a row brings: its ``id``, or the ``prompt_id`` of a token row."""
    key = "prompt_id" if raw.get("id") is None and "response_tokens" in row else "id"
    if (given := raw.get(key)) is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise InputError(f"{where}: '{key}' is {_kind(given)}, expected a non-empty string or an integer")
    return str(given)


def _tokens(where: str, raw: dict[str, Any], key: str) -> np.ndarray:
    """``raw[key]`` as an int64 array; a JSON list of integers, or what a Parquet column gave."""
    value = raw.get(key)
    if isinstance(value, list) and all(type(token) is int for token in value):
        value = np.asarray(value, np.int64)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        got = "missing" if value is None else _kind(value) if not isinstance(value, np.ndarray) else "a list with nulls"
        raise InputError(f"{where}: '{key}' is {got}, expected a list of token ids")
    return value.astype(np.int64, copy=False)


def _text(where: str, raw: dict[str, Any], key: str, *, numbers: bool = False) -> str:
    """``raw[key]`` as a non-empty string; with ``numbers`` also a JSON number, as it is written."""
    if key not in raw:
        raise InputError(f"{where}: has no '{key}' (it has: {', '.join(raw) or 'nothing'})")
    value = raw[key]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {_kind(value)}, expected a string")
    if not value.strip():
        raise InputError(f"{where}: '{key}' is empty")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, for a person: "a list", "null", "the number 3"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    return {list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
