"""Mathematics with free-form answers, judged by the `math-verify` library.

Row fields: ``prompt`` (the problem in words) and ``answer`` (the reference answer, plain or
LaTeX: ``1/2``, ``\\frac{1}{2}``, ``\\boxed{0.5}``).  The library extracts the final answer of a
response (the last ``\\boxed{…}``, else the last expression) and compares it as mathematics:
``0.5`` equals ``\\frac{1}{2}``.  https://github.com/huggingface/Math-Verify
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from opd_ray.tasks.words import InWords

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters


class MathTask(InWords):
    """The `opd_ray.tasks.Task` for mathematical problems."""

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Is the final answer of ``response`` equal to ``row["answer"]`` as mathematics?

        May run for ever and take all memory, with the GIL held: `opd_ray.tasks.judge` has the limits. The library's
        own use SIGALRM, whose handler does not run while sympy holds the GIL, and would take the place of the judge's.
        """
        if not (gold := self._parse(row["answer"])):
            return False
        predicted = _math_verify().parse(_last_box(response), parsing_timeout=None)
        return bool(_math_verify().verify(gold, predicted, timeout_seconds=None))

    def reads(self, answer: str) -> bool:
        """Does the library find an answer in it? It finds none in ``\\text{}``, ``$`` or ``\\boxed{}``."""
        return answer.isdecimal() or bool(self._parse(answer))

    def load(self) -> None:
        """The library, and sympy, which the first parse completes."""
        self._parse("1")

    def _parse(self, answer: str) -> list[Any]:
        return _math_verify().parse(_as_latex(answer), parsing_timeout=None) if answer else []


def _as_latex(answer: str) -> str:
    """Put a bare answer between dollars: the library reads LaTeX only inside delimiters."""
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return answer if marked else f"${answer}$"


def _last_box(response: str) -> str:
    """The last whole ``\\boxed{…}``, or all of a response without one: the library would take several as a set."""
    for start in reversed([match.start() for match in _BOX.finditer(response)]):
        depth = 0
        for brace in _BRACE.finditer(response, start):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return response[start : brace.end()]
    return response


def _math_verify():
    """The library, imported on first use: it brings sympy, and the other tasks do not need it."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time-out
    return math_verify
