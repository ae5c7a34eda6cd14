"""Prompts, golden solutions and problems as checked rows, from wherever they are.

A row that cannot be used is refused here, with source and row, before a model loads; nothing is
skipped silently. This module knows no tokenizer and no task; see :mod:`opd_ray.run.preflight` for lengths
and :mod:`opd_ray.data.golden` for what else a golden solution must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from opd_ray.config import Sources, listed
from opd_ray.config.data import COLUMNS
from opd_ray.data.columns import GOLDEN_COLUMNS, PROMPT_COLUMNS, Found, found, kind_of
from opd_ray.data.files import TOKEN_COLUMNS
from opd_ray.data.orders import Mix
from opd_ray.data.sources import read
from opd_ray.errors import InputError
from opd_ray.progress import watched

_OF_TASKS = ("gym", "entry")
"""What reasoning-gym's own sources say besides: the verifier of the row gets it as it is."""


class Rows(list[dict[str, Any]]):
    """The rows of sources, in their order: row i here is row i + 1 of the only one, or is counted through."""

    has_ids: bool = True
    """Did every row bring an id of its own? Where one did not, its id is its row number."""
    sizes: Sequence[int] = ()
    """Rows of each source."""
    weights: Sequence[float] = ()
    """Of each source, if they have any."""
    columns: frozenset[str] = frozenset()
    """The names that the sources have."""

    def only(self, indices: Sequence[int]) -> Rows:
        """Those rows alone."""
        rows = Rows(self[index] for index in indices)
        rows.has_ids, rows.sizes, rows.weights = self.has_ids, self.sizes, self.weights
        return rows

    def mix(self, where: str, numbers: Iterable[int]) -> Mix | None:
        """By source, the indices of what is left: of the rows of these numbers. None where sources have no weights.
        Raises InputError where a source has none left."""
        if not self.weights:
            return None
        source = np.searchsorted(np.cumsum(self.sizes), np.asarray(list(numbers)) - 1, side="right")
        groups = tuple(np.flatnonzero(source == each) for each in range(len(self.sizes)))
        if empty := [each for each, group in enumerate(groups, start=1) if not len(group)]:
            what = f"source {empty[0]} of {len(groups)} has a weight, but no row of it is left"
            raise InputError(f"{where}: {what}; remove it from the list")
        return Mix(groups, tuple(self.weights))


def question(row: Mapping[str, Any]) -> str:
    """What makes two rows the same problem: what is asked, turn by turn, whatever the system is told."""
    before = (turn["content"] for turn in row.get("before", ()) if turn["role"] != "system")
    return "\n".join((*before, row["prompt"])).strip()


def read_prompts(sources: Sources, need_answer: bool = True, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of sources of prompts, each with the keys id, prompt and answer, and teacher if the row names one.

    All of them are strings (numbers become strings). ``id`` defaults to the row number. Without
    ``need_answer`` a row may lack its answer, which is then "". ``columns`` is data.columns. Turns before the prompt,
    where there are any, are in ``before``, as {role, content}; what ``columns`` adds is there as it is. Raises
    InputError naming source and row.
    """
    return _checked(sources, PROMPT_COLUMNS, columns or {}, partial(_prompt, need_answer=need_answer))


def read_golden(sources: Sources, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of sources of golden solutions, as text or as tokens.

    A text row has a prompt and a non-empty response. A token row, as in a rollout log, has prompt_tokens and
    response_tokens (integer arrays); its id is prompt_id, which may occur more than once, and its prompt is ""
    unless given. Both may have answer (else ""), before, teacher, finish_reason, correct (bool) and text (string); keys
    of absent values are absent. Where there are several responses to choose from, ``response`` is the first (or "" if
    none is good) and ``others`` are the rest. Raises InputError naming source and row.
    """
    return _checked(sources, GOLDEN_COLUMNS, columns or {}, _golden)


def _checked(
    sources: Sources,
    wanted: Sequence[str],
    columns: Mapping[str, str],
    check: Callable[[str, Found], dict[str, Any]],
) -> Rows:
    rows, first_use, names, several = Rows(), {}, set(), listed(sources)
    own = [name for name in columns if name not in COLUMNS]
    for place, each in enumerate(several):
        source, before = each.source, len(rows)
        kept = [*own, *_OF_TASKS] if each.made_up else own
        for number, raw in watched(read(source, [*wanted, *columns.values()]), f"rows of {source}"):
            where = f"{source} row {number}"
            if not isinstance(raw, dict):
                raise InputError(f"{where}: expected an object with a 'prompt', got {kind_of(raw)}")
            names.update(raw)
            row_found = found(where, raw, columns)
            raw = row_found.columns
            row = {name: raw[name] for name in kept if name in raw} | check(where, row_found)
            given = _id(where, raw, row)
            rows.has_ids = rows.has_ids and given is not None
            name = row["id"] = (f"{place + 1}-" * (len(several) > 1) + str(number)) if given is None else given
            if name in first_use and "response_tokens" not in row:
                raise InputError(
                    f"{where}: id {name!r} is also that of {first_use[name]}; "
                    "make ids unique, or leave them out to use row numbers"
                )
            first_use[name] = f"row {number}" + (f" of {source}" if len(several) > 1 else "")
            rows.append(row)
        if len(rows) == before:
            raise InputError(f"{source}: has no rows; give a file with one problem per row")
        rows.sizes = (*rows.sizes, len(rows) - before)
    rows.weights = [each.weight for each in several if each.weight is not None]
    rows.columns = frozenset(names)
    return rows


def _prompt(where: str, read: Found, *, need_answer: bool, need_prompt: bool = True) -> dict[str, Any]:
    raw = read.columns
    given = {name for name in ("prompt", "answer") if raw.get(name) is not None}
    row = {"id": "", "prompt": _text(where, raw, "prompt") if need_prompt or "prompt" in given else ""}
    row["answer"] = _text(where, raw, "answer", numbers=True) if need_answer or "answer" in given else ""
    if read.before:
        row["before"] = read.before
    if raw.get("teacher") is not None:
        row["teacher"] = _text(where, raw, "teacher")
    return row


def _golden(where: str, read: Found) -> dict[str, Any]:
    raw = read.columns
    as_tokens = raw.get("response_tokens") is not None
    row = _prompt(where, read, need_answer=False, need_prompt=not as_tokens)
    if as_tokens:
        row |= {name: _tokens(where, raw, name) for name in TOKEN_COLUMNS}
        row |= {"text": raw["text"]} if isinstance(raw.get("text"), str) else {}
    elif read.responses is not None:
        row["response"], *row["others"] = read.responses or [""]
    else:
        row["response"] = _text(where, raw, "response")
    if raw.get("finish_reason") is not None:
        row["finish_reason"] = _text(where, raw, "finish_reason")
    if (verdict := raw.get("correct")) is not None:
        if not isinstance(verdict, bool):
            raise InputError(f"{where}: 'correct' is {kind_of(verdict)}, expected true or false")
        row["correct"] = verdict
    return row


def _id(where: str, raw: dict[str, Any], row: dict[str, Any]) -> str | None:
    """The id that a row brings: its ``id``, or the ``prompt_id`` of a token row."""
    key = "prompt_id" if raw.get("id") is None and "response_tokens" in row else "id"
    if (given := raw.get(key)) is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise InputError(f"{where}: '{key}' is {kind_of(given)}, expected a non-empty string or an integer")
    return str(given)


def _tokens(where: str, raw: dict[str, Any], key: str) -> np.ndarray:
    """``raw[key]`` as an int64 array; a JSON list of integers, or what a Parquet column gave."""
    value = raw.get(key)
    if isinstance(value, list) and all(type(token) is int for token in value):
        if value and not -(2**31) <= min(value) <= max(value) < 2**31:
            raise InputError(f"{where}: '{key}' has {max(value, key=abs)}, which is no token id")
        value = np.asarray(value, np.int64)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        got = "a list with nulls" if isinstance(value, np.ndarray) else "missing" if value is None else kind_of(value)
        raise InputError(f"{where}: '{key}' is {got}, expected a list of token ids")
    return value.astype(np.int64, copy=False)


def _text(where: str, raw: dict[str, Any], key: str, *, numbers: bool = False) -> str:
    """``raw[key]`` as a non-empty string; with ``numbers`` also a JSON number, as it is written."""
    if key not in raw:
        raise InputError(
            f"{where}: has no '{key}' (it has: {', '.join(raw) or 'nothing'}); say which column it is, as "
            f"data.columns={{{key}: NAME}}"
        )
    value = raw[key]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"{where}: '{key}' is {value}, expected a string or a number; mend it or remove the row")
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {kind_of(value)}, expected a string")
    if not value.strip():
        raise InputError(f"{where}: '{key}' is empty")
    return value
