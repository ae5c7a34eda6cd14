"""What the columns of others mean: names that are mapped or known, conversations, and generations to choose from.

data.columns        {prompt: query}: the column query is our prompt; {tests: unit_tests}: one more, for the task
problem, question   a prompt, where there is no column of that name
messages            [{role, content}, ...]: the last user turn is the prompt, what is before it goes before it, and an
                    assistant's turn at the end is the response; a prompt may have this form, too
generations         of OpenR1: those that correctness_math_verify and is_reasoning_complete call right and complete, the
                    shortest first: it fits the budget most likely, and the method is about answers that do not run on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from opd_ray.data.files import TOKEN_COLUMNS
from opd_ray.errors import InputError

_PROMPTS = ("problem", "question")
_CONVERSATIONS = ("messages", "conversations")
_MARKS = ("correctness_math_verify", "is_reasoning_complete")
PROMPT_COLUMNS = ("id", "prompt", *_PROMPTS, *_CONVERSATIONS, "answer", "teacher")
"""All that are looked for in a source of prompts."""
GOLDEN_COLUMNS = (
    *PROMPT_COLUMNS,
    *("prompt_id", "response", "completion", "generations", *_MARKS, "finish_reason", "correct", "text"),
    *TOKEN_COLUMNS,
)


@dataclasses.dataclass
class Found:
    """A row of somebody's, and what its columns amount to beside those that have a name."""

    columns: dict[str, Any]
    """All of them, and under our names prompt and response, where they are there."""
    before: Sequence[dict[str, str]] = ()
    """The turns before the prompt."""
    responses: Sequence[str] | None = None
    """Those to choose from, where there are several, the best first."""


def found(where: str, raw: Mapping[str, Any], columns: Mapping[str, str]) -> Found:
    """What a row says, by ``columns``, which is data.columns, and by what is known."""
    row = {**raw, **{ours: raw[theirs] for ours, theirs in columns.items() if raw.get(theirs) is not None}}
    for name in _PROMPTS:
        if row.get("prompt") is None and row.get(name) is not None:
            row["prompt"] = row[name]
    read = Found(row)
    _choose_response(where, read)
    for name in ("prompt", *_CONVERSATIONS):
        if name == "prompt" or row.get("prompt") is None:
            _take_apart(where, read, name)
    return read


def _choose_response(where: str, read: Found) -> None:
    row = read.columns
    if row.get("response") is None and row.get("completion") is not None:
        row["response"] = row["completion"]
    if _is_conversation(row.get("response")):
        turns = _turns(where, "response", row["response"])
        if (roles := [turn["role"] for turn in turns]) != ["assistant"]:
            raise InputError(
                f"{where}: its response is a conversation of {', '.join(roles)}, expected one turn of the assistant's; "
                "whole conversations are read from messages (data.columns={messages: NAME})"
            )
        row["response"] = turns[0]["content"]
    if row.get("response") is None and isinstance(generations := row.get("generations"), list):
        marks = [row[name] for name in _MARKS if row.get(name) is not None]
        if any(not isinstance(mark, list) or len(mark) != len(generations) for mark in marks):
            raise InputError(f"{where}: has {len(generations)} generations, expected as many values in {_MARKS}")
        good = [text for text, *given in zip(generations, *marks, strict=True) if isinstance(text, str) and all(given)]
        read.responses = sorted(filter(str.strip, good), key=len)


def _take_apart(where: str, read: Found, name: str) -> None:
    """The conversation in the column ``name``, where it is one, as prompt, before and response."""
    row = read.columns
    if not _is_conversation(row.get(name)):
        return
    turns = _turns(where, name, row[name])
    if turns[-1]["role"] == "assistant":
        response = turns.pop()["content"]
        if row.get("response") is None and read.responses is None:
            row["response"] = response
    if not turns or turns[-1]["role"] != "user":
        raise InputError(f"{where}: '{name}' has no turn of the user's that the response answers")
    row["prompt"] = turns.pop()["content"]
    read.before = turns


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _turns(where: str, name: str, turns: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise InputError(
                f"{where}: turn {number} of '{name}' has {', '.join(turn) or 'nothing'}, expected role and content as "
                "text (tools and images are not read)"
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def kind_of(value: Any) -> str:
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
