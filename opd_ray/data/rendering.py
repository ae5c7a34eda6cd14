"""From a row to the token ids of its prompt: what the task asks, in the chat template of the student."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd_ray.config.data import DataConfig
from opd_ray.errors import InputError
from opd_ray.models.checkpoints import load_tokenizer
from opd_ray.tasks import Task

BYTES_PER_TOKEN = 32
"""More than text has: prose 4, long words and indentation 16. What is longer than a context by it is not tokenised."""
_OPEN, _TAIL_TOKENS = "<think>", 8


class Renderer:
    """Who makes token ids of rows: the task, data.system_prompt, prompt_template and template_kwargs, and the tokenizer
    in ``path``, which is read when it is first needed."""

    def __init__(self, task: Task, path: str, data: DataConfig | None = None) -> None:
        """``data``: by default prompts are asked as they stand."""
        self.task, self.path, self._data = task, path, data or DataConfig()
        self.most_tokens: int | None = None
        """The longest context that a prompt is for, once models are known; None bounds nothing."""

    def of_model(self, path: str) -> Renderer:
        """The same for another model's tokenizer."""
        return Renderer(self.task, path, self._data)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def check(self, name: str) -> None:
        """Refuses template_kwargs that the chat template of the model ``name`` does not look at."""
        template = str(self.tokenizer.chat_template or "")
        for key in self._data.template_kwargs:
            if not re.search(rf"\b{re.escape(key)}\b", template):
                has = "does not use it" if template else "is missing: it is a base model"
                raise InputError(
                    f"data.template_kwargs.{key}: the chat template of {name} {has}; leave it out or mend its name"
                )

    def prompt(self, row: Mapping[str, Any], solution: str | None = None) -> list[int]:
        """Token ids of the prompt, special tokens and chat markup included, up to where the answer starts; with
        ``solution`` in it, for a teacher that is shown it."""
        return self.tokens(self.turns(row, solution))

    def continuation(self, prompt_tokens: Sequence[int], response: str) -> str:
        """The response without a ``<think>`` that the chat template has opened at the end of the prompt already."""
        bare = response.lstrip()
        if not bare.startswith(_OPEN):
            return response
        end = self.tokenizer.decode(list(prompt_tokens[-_TAIL_TOKENS:]))
        if not end.rstrip().endswith(_OPEN):
            return response
        bare = bare.removeprefix(_OPEN)
        return bare if end.endswith(_OPEN) else bare.lstrip("\n")

    def turns(self, row: Mapping[str, Any], solution: str | None = None) -> list[Mapping[str, str]]:
        """The same as a conversation."""
        asked = self.task.prompt(row) if solution is None else self.task.privileged_prompt(row, solution)
        content = self._data.prompt_template.replace("{prompt}", asked)
        turns = [*row.get("before", ()), {"role": "user", "content": content}]
        if self._data.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._data.system_prompt})
        return turns

    def tokens(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """A tokenizer without a chat template (a base model) gets the texts as they stand, one after the other, with
        the special tokens that it puts at the beginning of any text. Raises InputError for one that no context holds,
        which would take hundreds of bytes of memory for each of its own."""
        size = sum(len(turn["content"].encode()) for turn in turns)
        if self.most_tokens and size > BYTES_PER_TOKEN * self.most_tokens:
            raise InputError(f"its {size} bytes are more than any context here holds: {self.most_tokens} tokens")
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode("\n\n".join(turn["content"] for turn in turns))
        return self.tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False, **self._data.template_kwargs
        )

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the tokenizer for itself, should it need it."""
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}
