"""Problems in words, as a language model reads them: what such tasks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The wording is ours; its parts (problem, reference solution, own words) are OPSD's teacher prompt.
_PRIVILEGED = """{prompt}

Here is a correct reference solution to this problem:

{solution}

Now solve the problem yourself: understand why each step of the reference is right, then reason in your own \
words, without mentioning or copying it, and end with the final answer."""


class InWords:
    """All of an `opd_ray.tasks.Task` but ``verify``, which a task of one's own adds."""

    verify_limit_s: float | None = 5.0

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The problem as it stands."""
        return row["prompt"]

    def privileged_prompt(self, row: Mapping[str, Any], solution: str) -> str:
        """The problem with the reference solution, and the request to answer in own words."""
        return _PRIVILEGED.format(prompt=row["prompt"], solution=solution)

    def reads(self, answer: str) -> bool:
        """Any answer can be compared."""
        return True

    def load(self) -> None:
        """Needs nothing."""
