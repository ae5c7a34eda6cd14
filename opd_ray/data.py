"""Prompt, golden and evaluation files: JSONL or Parquet in, checked rows out.

A row that cannot be used is refused here, with file and row, before a model loads; nothing is
skipped silently. This module knows no tokenizer and no task; see :mod:`opd_ray.preflight` for lengths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.errors import InputError

_COLUMNS = ("id", "prompt", "answer", "response")
_PARQUET_MAGIC = b"PAR1"


def read_prompts(path: str, need_response: bool = False) -> list[dict[str, str]]:
    """The rows of a file, in its order, each with the keys id, prompt and answer, all of them strings.

    With ``need_response`` (golden files) there is also a non-empty ``response``, and ``answer`` may be
    missing from the file (then it is ""). ``id`` defaults to the row number; numbers become strings.
    Row i of the result is row i + 1 of the file. Raises InputError naming file and row.
    """
    rows: list[dict[str, str]] = []
    first_use: dict[str, int] = {}
    for number, raw in _read(Path(path)):
        row = _check_row(f"{path} row {number}", number, raw, need_response)
        if row["id"] in first_use:
            raise InputError(
                f"{path} row {number}: id {row['id']!r} is also that of row {first_use[row['id']]}; "
                "make ids unique, or leave them out to use row numbers"
            )
        first_use[row["id"]] = number
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: has no rows; give a file with one problem per row")
    return rows


def _read(path: Path) -> Iterator[tuple[int, Any]]:
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
    return _read_parquet(path) if suffix == ".parquet" else _read_jsonl(path)


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


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(path)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: Parquet that cannot be read ({' '.join(str(error).split())})") from None


def _check_row(where: str, number: int, raw: Any, need_response: bool) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with a 'prompt', got {_kind(raw)}")
    row = {"id": str(number), "prompt": _text(where, raw, "prompt")}
    if (given := raw.get("id")) is not None:
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise InputError(f"{where}: 'id' is {_kind(given)}, expected a non-empty string or an integer")
        row["id"] = str(given)
    row["answer"] = "" if need_response and raw.get("answer") is None else _text(where, raw, "answer", numbers=True)
    if need_response:
        row["response"] = _text(where, raw, "response")
    return row


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
