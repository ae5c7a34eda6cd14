"""Tasks: how a row becomes a prompt, and whether a response answers it.

A row is one line of a prompts or golden JSONL file.  The loop knows tasks only through the
`Task` protocol; it never sees what a prompt is about.  To add one, write a class with its
members in a new module here and name it in ``_TASKS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from opd_ray.errors import InputError, near

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(Protocol):
    """What the loop and the evaluation ask of a task."""

    verify_limit_s: float | None
    """Seconds after which a verdict is given up, in a process of its own (:mod:`opd_ray.tasks.judge`); None for a task
    that is quick whatever the model writes, which is asked in line."""

    def format_prompt(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token ids of the prompt, special tokens and chat markup included."""
        ...

    def format_privileged_prompt(
        self, row: Mapping[str, Any], solution: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """The token ids of the prompt with a correct ``solution`` in it, for a teacher that is shown it.

        What such a teacher thinks of a response steers a student that sees only `format_prompt`
        (OPSD: on-policy self-distillation).
        """
        ...

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Is ``response`` right?  It is decoded text without special tokens; a row without an answer ("") has none.

        Only the text is judged.  Whether the response ended by itself or was cut at the
        length budget is known from its finish reason, and the caller checks that.
        """
        ...

    def reads(self, answer: str) -> bool:
        """Can a response be compared with ``answer``?  Preflight asks, and within the same limit."""
        ...

    def load(self) -> None:
        """Imports what verdicts need, so that the limit does not count it; asked only where there is one."""
        ...


# Name, also of the module, to class.  Modules are imported on first use, so that asking for one task does not need
# the packages of another.
_TASKS = {"chain": "ChainTask", "math": "MathTask"}


def get_task(name: str) -> Task:
    """The task registered as ``name``; InputError with the near names for any other."""
    if name not in _TASKS:
        raise InputError(f"unknown task {name!r}{near(name, _TASKS)}")
    return getattr(importlib.import_module(f"opd_ray.tasks.{name}"), _TASKS[name])()
