"""JSONL and Parquet files as rows of whatever they hold; a file that cannot be read is refused by name and row.

What the rows must be is :mod:`opd_ray.data.rows`.
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

TOKEN_COLUMNS = ("prompt_tokens", "response_tokens")
"""Read without going through Python numbers, which long lists would be too many of."""
_PARQUET_MAGIC = b"PAR1"


def read(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Row numbers and rows, by suffix, once the content has been found to agree with it. Of a Parquet file the
    ``columns`` that are there, nulls left out, and the names of its others with None; all that JSON objects have."""
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise InputError(
            f"{path}: {what}; give a JSONL or Parquet file of prompts, or org/name:split of the Hugging Face Hub"
        )
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
        names = file.schema_arrow.names
        there = [name for name in dict.fromkeys(columns) if name in names]
        others = dict.fromkeys(name for name in names if name not in there)
        tokens = [name for name in there if name in TOKEN_COLUMNS]
        number = 0
        for batch in file.iter_batches(columns=there):
            rows = batch.select([name for name in there if name not in tokens]).to_pylist() or [{} for _ in batch]
            for name in tokens:
                for row, scalar in zip(rows, batch[name], strict=True):
                    row[name] = _token_array(path, name, scalar)
            for row in rows:
                number += 1
                yield number, others | {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: Parquet that cannot be read ({' '.join(str(error).split())})") from None


def _token_array(path: Path, name: str, scalar: pa.Scalar) -> np.ndarray | None:
    """A cell of a token column."""
    kind = scalar.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise InputError(f"{path}: column '{name}' holds {kind}, expected lists of integers (token ids)")
    return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None
