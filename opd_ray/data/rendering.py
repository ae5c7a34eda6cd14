"""From a row to the token ids of its prompt: what the task asks, in the chat template of the student."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from opd_ray.models.checkpoints import load_tokenizer
from opd_ray.tasks import Task


class Renderer:
    """Who makes token ids of rows: the task, and the tokenizer in ``path``, which is read when it is first needed."""

    def __init__(self, task: Task, path: str) -> None:
        self.task, self._path = task, path

    def of_model(self, path: str) -> Renderer:
        """The same for another model's tokenizer."""
        return Renderer(self.task, path)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._path)

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of the prompt, special tokens and chat markup included, up to where the answer starts."""
        return self._tokens(self.task.prompt(row))

    def privileged_prompt(self, row: Mapping[str, Any], solution: str) -> list[int]:
        """The same with the solution in it, for a teacher that is shown it."""
        return self._tokens(self.task.privileged_prompt(row, solution))

    def _tokens(self, content: str) -> list[int]:
        """A tokenizer without a chat template (a base model) gets the text as it stands, with the special tokens that
        it puts at the beginning of any text."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(content)
        turns = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the tokenizer for itself, should it need it."""
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}
