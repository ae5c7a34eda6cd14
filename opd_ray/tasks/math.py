"""Mathematics with free-form answers, judged by the `math-verify` library.

Row fields: ``prompt`` (the problem in words) and ``answer`` (the reference answer, plain or
LaTeX: ``1/2``, ``\\frac{1}{2}``, ``\\boxed{0.5}``).  The library extracts the final answer of a
response (a ``\\boxed{…}`` first, else the last expression) and compares it as mathematics:
``0.5`` equals ``\\frac{1}{2}``.  https://github.com/huggingface/Math-Verify
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIME_LIMIT_S = 5  # for one parse or comparison; sympy can take for ever on odd expressions
# The wording is ours; its parts (problem, reference solution, own words) are OPSD's teacher prompt.
_PRIVILEGED = """{prompt}

Here is a correct reference solution to this problem:

{solution}

Now solve the problem yourself: understand why each step of the reference is right, then reason in your own \
words, without mentioning or copying it, and end with the final answer."""


class MathTask:
    """The `opd_ray.tasks.Task` for mathematical problems."""

    def format_prompt(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of one user turn in the tokenizer's chat template, up to where the answer starts.

        A tokenizer without a template (a base model) gets the prompt as it stands, with the
        special tokens it puts at the beginning of any text.
        """
        return _user_turn(row["prompt"], tokenizer)

    def format_privileged_prompt(
        self, row: Mapping[str, Any], solution: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """The same turn with the problem, the reference solution, and the request to answer in own words."""
        return _user_turn(_PRIVILEGED.format(prompt=row["prompt"], solution=solution), tokenizer)

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Is the final answer of ``response`` equal to ``row["answer"]`` as mathematics?"""
        if not row["answer"]:
            return False
        library = _math_verify()
        # The library's own time-outs use SIGALRM, which only a main thread may set: in the worker
        # threads of an actor it raises ValueError.
        limit_s = TIME_LIMIT_S if threading.current_thread() is threading.main_thread() else None
        gold = library.parse(_as_latex(str(row["answer"])), parsing_timeout=limit_s)
        if not gold:
            raise InputError(
                f"row {row.get('id', '?')!r}: math-verify finds no answer in {row['answer']!r}; "
                "expected a number or an expression, plain or LaTeX"
            )
        predicted = library.parse(response, parsing_timeout=limit_s)
        return bool(library.verify(gold, predicted, timeout_seconds=limit_s))


def _user_turn(content: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer.encode(content)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )


def _as_latex(answer: str) -> str:
    """Put a bare answer between dollars: the library reads LaTeX only inside delimiters."""
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return answer if marked else f"${answer}$"


def _math_verify():
    """The library, imported on first use: it brings sympy, and the other tasks do not need it."""
    try:
        import math_verify
    except ImportError as error:
        raise InputError("task 'math' needs the package math-verify: pip install 'opd_ray[math]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time-out
    return math_verify
