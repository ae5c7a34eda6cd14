"""Tasks: how a prompt is rendered and how an answer is verified.

A new task is a new small module with a class of two methods, and one line in ``_TASKS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from opd_ray.errors import InputError, near

_TASKS = {"chain": "opd_ray.tasks.chain:ChainTask", "math": "opd_ray.tasks.math:MathTask"}


class Task(Protocol):
    """What rollouts are about. Implementations are stateless and picklable."""

    def format_prompt(self, row: Mapping[str, Any], tokenizer: Any) -> list[int]:
        """Token ids of the prompt of one row of a prompt file."""

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Whether the text (special tokens removed) answers the row; whether it ended is not asked."""


def get_task(name: str) -> Task:
    """The task registered under ``name``; InputError for an unknown one."""
    if name not in _TASKS:
        raise InputError(f"data.task '{name}' is unknown{near(name, _TASKS)}")
    module, _, attribute = _TASKS[name].partition(":")
    return getattr(import_module(module), attribute)()
