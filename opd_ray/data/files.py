"""JSONL and Parquet files as rows of whatever they hold; a file that cannot be read is refused by name and row.

What the rows must be is :mod:`opd_ray.data.rows`.
"""

from __future__ import annotations

import json
import os
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
_LONGEST_ROW = 2**25
"""Bytes of a row of JSON; what is longer is no problem, but a file without line ends."""


def read(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Row numbers and rows, by suffix, once the content has been found to agree with it. Of a Parquet file the
    ``columns`` that are there, nulls left out, and the names of its others with None; all that JSON objects have."""
    if not os.path.isfile(path):  # unlike Path.is_file it says no to names that no file can have
        what = "is a directory, not a file" if os.path.isdir(path) else "no such file"
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
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_ROW + 1), b""), start=1):
            if len(line) > _LONGEST_ROW:
                raise InputError(f"{path} row {number}: has more than {_LONGEST_ROW} bytes; expected one problem a row")
            if not line.strip():
                blank = blank or number
                continue
            if blank:  # blank lines at the end are no rows; elsewhere they would shift the numbers of rows
                raise InputError(f"{path} row {blank}: is blank; remove the line")
            yield number, _from_json(f"{path} row {number}", line)


class _Twice(Exception):
    """A key of an object, in JSON, that is there more than once."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(repr(next(name for name in names if names.count(name) > 1)))
    return made


def _from_json(where: str, line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # an escape may be half a character
        return row
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text ({error.reason})") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(f"{where}: {half} is half of a surrogate pair, which is no text; mend it") from None
    except _Twice as error:
        raise InputError(f"{where}: has {error} twice; remove one of them") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); "
            'expected one object per line, like {"prompt": "...", "answer": "..."}'
        ) from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply; expected an object of texts and numbers") from None
    except ValueError:
        raise InputError(f"{where}: has a number of thousands of digits; write it as a string") from None


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
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
    # Damage shows as bytes that are no text, as dates that are none, or as sizes that no memory has.
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise InputError(f"{path}: Parquet that cannot be read ({' '.join(str(error).split())})") from None


def _token_array(path: Path, name: str, scalar: pa.Scalar) -> np.ndarray | None:
    """A cell of a token column."""
    kind = scalar.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise InputError(f"{path}: column '{name}' holds {kind}, expected lists of integers (token ids)")
    return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None
