"""Prompts as token ids, and the stream of them that a run is given."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.data.orders import Order, order_of
from opd_ray.data.rendering import BYTES_PER_TOKEN, Renderer
from opd_ray.errors import InputError
from opd_ray.messages import PromptGroup
from opd_ray.models.checkpoints import ModelFacts

DEFAULT_TEACHER = "teacher"
"""The teacher of a row that names none."""
_BEGINNING = 10_000
_SAMPLE = 256
"""Prompts, of a large file, that tell whether the tokenizer is made for them."""


class Prompts:
    """The rows of a file and their prompts as token ids (int32), each made when it is first asked for, and once.

    With ``solutions``, one for each row, a prompt has its solution in it, as a privileged teacher is shown it.
    """

    def __init__(
        self,
        where: str,
        rows: Sequence[Mapping[str, Any]],
        renderer: Renderer,
        solutions: Sequence[str] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """``numbers``: those of the rows in their source, where they are not 1, 2, ..."""
        self.where, self.rows, self.renderer, self._solutions = where, rows, renderer, solutions
        self.numbers = numbers or range(1, len(rows) + 1)
        self._tokens: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises InputError with file and row for what cannot be rendered."""
        if index not in self._tokens:
            with self._rendering(index):
                self._tokens[index] = np.asarray(self.renderer.prompt(*self._asked(index)), np.int32)
        return self._tokens[index]

    def longest(self) -> tuple[int, int]:
        """Tokens and number (1-based) of the row with the longest prompt.

        From the most that a prompt can have downwards, and not further than one could still win: a few rows of a large
        file are tokenised.
        """
        longest, number = 0, 0
        for most, index in self._by_size():
            if most <= longest:
                break
            if len(self[index]) > longest:
                longest, number = len(self[index]), self.numbers[index]
        return longest, number

    def longer_than(self, limit: int) -> list[int]:
        """Indices of the prompts of more than ``limit`` tokens."""
        return sorted(
            index
            for most, index in itertools.takewhile(lambda each: each[0] > limit, self._by_size())
            if most > BYTES_PER_TOKEN * limit or len(self[index]) > limit
        )

    def without(self, left_out: Collection[int]) -> Prompts:
        """All but the prompts of these indices; rows keep their numbers."""
        gone = set(left_out)
        kept = [index for index in range(len(self)) if index not in gone]
        rows, solutions = self.rows.only(kept), self._solutions and [self._solutions[i] for i in kept]
        rest = Prompts(self.where, rows, self.renderer, solutions, [self.numbers[i] for i in kept])
        rest._tokens = {new: self._tokens[old] for new, old in enumerate(kept) if old in self._tokens}
        return rest

    def order(self, seed: int, shuffle: bool) -> Order:
        """In which they are visited."""
        return order_of(len(self), self.rows.mix(self.where, self.numbers), seed, shuffle)

    def _by_size(self) -> list[tuple[int, int]]:
        """The most tokens that each prompt can have, and its index, largest first: a text has at most one token per
        byte, besides those of the template around turns of these roles."""
        around: dict[tuple[str, ...], int] = {}
        sizes = []
        for index in range(len(self)):
            with self._rendering(index):
                turns = self.renderer.turns(*self._asked(index))
                roles = tuple(turn["role"] for turn in turns)
                if roles not in around:  # an empty turn may be left out
                    around[roles] = len(self.renderer.tokens([{"role": role, "content": "x"} for role in roles]))
                sizes.append((around[roles] + sum(len(turn["content"].encode()) for turn in turns), index))
        return sorted(sizes, key=lambda each: -each[0])

    def _asked(self, index: int) -> tuple[Mapping[str, Any], str | None]:
        return self.rows[index], None if self._solutions is None else self._solutions[index]

    @contextlib.contextmanager
    def _rendering(self, index: int) -> Iterator[None]:
        """Tasks and chat templates are others' code: what they raise is told with the row."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            where = f"{self.where} row {self.numbers[index]}"
            raise InputError(f"{where}: its prompt cannot be rendered ({reason})") from None


class PromptStream:
    """Slot number to the prompt that is admitted in it."""

    def __init__(
        self,
        prompts: Prompts,
        *,
        order: Order | None = None,
        num_responses: int = 1,
        seed: int = 0,
        shown: Prompts | None = None,
        translated: Mapping[str, Prompts] = MappingProxyType({}),
    ) -> None:
        """Without ``order`` slots are rows; ``shown`` are the prompts as a teacher sees them that sees others than the
        student, ``translated`` those of teachers with another tokenizer, by name."""
        self._prompts, self._order, self._shown, self._translated = prompts, order, shown, translated
        self._num_responses, self._seed = num_responses, seed

    def __len__(self) -> int:
        """Rows of one epoch; slots go on beyond it."""
        return len(self._prompts)

    def row(self, slot: int) -> Mapping[str, Any]:
        """The file's row of the prompt."""
        return self._prompts.rows[self._index(slot)]

    def _index(self, slot: int) -> int:
        return slot if self._order is None else self._order[slot]

    def __getitem__(self, slot: int) -> PromptGroup:
        index, row = self._index(slot), self.row(slot)
        teacher = row.get("teacher", DEFAULT_TEACHER)
        shown = self._translated.get(teacher, self._shown)
        return PromptGroup(
            slot=slot,
            prompt_id=row["id"],
            prompt_tokens=tuple(self._prompts[index].tolist()),
            row=dict(row),
            num_responses=self._num_responses,
            seed=_request_seed(self._seed, slot * max(self._num_responses, 1)),
            teacher=teacher,
            privileged_prompt_tokens=() if shown is None else tuple(shown[index].tolist()),
        )


def unknown_tokens(prompts: Prompts) -> tuple[float, list[int]]:
    """Of a sample of the prompts' own texts, of long ones the beginning, the share of tokens that the tokenizer does
    not know, and the indices of those of which it knows nothing."""
    tokenizer = prompts.renderer.tokenizer
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None) or tokenizer.unk_token
    unknown, total, none = 0, 0, []
    for index in range(0, len(prompts) if name is not None else 0, max(1, len(prompts) // _SAMPLE)):
        tokens = tokenizer.encode(prompts.rows[index]["prompt"][:_BEGINNING], add_special_tokens=False)
        count = tokens.count(tokenizer.convert_tokens_to_ids(name))
        unknown, total = unknown + count, total + len(tokens)
        none += [index] if count == len(tokens) else []
    return unknown / max(1, total), none


def _request_seed(seed: int, index: int) -> int:
    """A sampling seed below 2**62, well apart for neighbouring runs and requests."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 2)


def limits(models: Iterable[ModelFacts], config: Config) -> list[tuple[str, int]]:
    """Who limits the length of a sequence that these models see, and to how many tokens."""
    found = [(model.name, model.context_tokens) for model in models if model.context_tokens is not None]
    cap = config.student.max_context_tokens
    return found + ([("student.max_context_tokens", cap)] if cap else [])
