"""Tasks: what a row asks a model, and whether a response answers it.

The loop knows tasks only through the `Task` protocol; it never sees what a prompt is about, and a task sees neither
tokens nor chat templates (:mod:`opd_ray.data.rendering`).  One of your own is named ``module:Class``; to add one here,
write it in a new module and name it in ``_TASKS``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from opd_ray.errors import InputError, near


class Task(Protocol):
    """What the loop and the evaluation ask of a task. Stateless and picklable; made without arguments."""

    verify_limit_s: float | None
    """Seconds after which a verdict is given up, in a process of its own (:mod:`opd_ray.tasks.judge`); None for a task
    that is quick whatever the model writes, which is asked in line."""

    def prompt(self, row: Mapping[str, Any]) -> str:
        """What the model is asked."""
        ...

    def privileged_prompt(self, row: Mapping[str, Any], solution: str) -> str:
        """The same with a correct ``solution`` in it, for a teacher that is shown it.

        What such a teacher thinks of a response steers a student that sees only `prompt`
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
_TASKS = {"chain": "ChainTask", "math": "MathTask", "reasoning_gym": "ReasoningGymTask"}
_MEMBERS = ("prompt", "privileged_prompt", "verify", "reads", "load")


def get_task(name: str) -> Task:
    """The task registered as ``name``, or of the class ``module:Class``; InputError for any other."""
    if ":" in name:
        return _own_task(name)
    if name not in _TASKS:
        raise InputError(f"unknown task {name!r}{near(name, _TASKS)} (or module:Class, a task of your own)")
    return getattr(importlib.import_module(f"opd_ray.tasks.{name}"), _TASKS[name])()


def _own_task(name: str) -> Task:
    module_name, _, class_name = name.partition(":")
    where = f"data.task={name}"
    module = _import(where, module_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [each for each, value in vars(module).items() if isinstance(value, type)]
        raise InputError(f"{where}: {module.__file__} has no class {class_name!r}{near(class_name, classes)}")
    missing = [each for each in _MEMBERS if not callable(getattr(found, each, None))]
    missing += [] if hasattr(found, "verify_limit_s") else ["verify_limit_s"]
    if missing:
        raise InputError(
            f"{where}: the class lacks {', '.join(missing)} of opd_ray.tasks.Task; add them, or inherit them from "
            "opd_ray.tasks.words.InWords"
        )
    try:
        return found()
    except Exception as error:
        raise InputError(f"{where}: cannot be made without arguments ({_brief(error)})") from None


def look_here() -> None:
    """A module of the user's may lie in the current directory; the program's own is all that Python looks into."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _import(where: str, module_name: str) -> Any:
    look_here()
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"{where}: there is no module {error.name!r} in {os.getcwd()} or on PYTHONPATH; give module:Class as "
                "it is imported"
            ) from None
        if sys.modules.get("torch", error) is None:
            raise  # the checks hide it, and begin again with it where that is in the way (opd_ray.run.preflight)
        raise InputError(f"{where}: {module_name} cannot be imported ({_brief(error)})") from None
    except Exception as error:
        raise InputError(f"{where}: {module_name} cannot be imported ({_brief(error)})") from None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
