"""Endless, reproducible orders over a data set: prompt ``i`` of a run depends on the seed alone.

That is what makes resuming exact: a run that trained ``n`` prompts goes on with prompt ``n``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.data.files import read_prompts
from opd_ray.messages import PromptGroup
from opd_ray.models.checkpoints import load_tokenizer
from opd_ray.tasks import Task, get_task

DEFAULT_TEACHER = "teacher"
"""The teacher of a row that names none."""


class Shuffled:
    """Position ``i`` to row index: every row once per epoch, a new order each epoch."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows, self._seed = num_rows, seed
        self._epoch, self._order = -1, np.arange(num_rows)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows)
        return int(self._order[offset])


class PromptStream:
    """Slot number to the prompt that is admitted in it."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        task: Task,
        tokenizer: Any,
        order: Shuffled | None,
        num_responses: int,
        seed: int,
        golden: Mapping[str, str] | None = None,
    ) -> None:
        """``golden`` (prompt id to the text of its solution) fills privileged_prompt_tokens."""
        self._golden = golden
        self._rows, self._task, self._tokenizer, self._order = rows, task, tokenizer, order
        self._num_responses, self._seed = num_responses, seed

    def __len__(self) -> int:
        """Rows of one epoch; slots go on beyond it."""
        return len(self._rows)

    def __getitem__(self, slot: int) -> PromptGroup:
        row = dict(self._rows[slot if self._order is None else self._order[slot]])
        privileged = []
        if self._golden is not None:
            solution = self._golden[str(row["id"])]
            privileged = self._task.format_privileged_prompt(row, solution, self._tokenizer)
        return PromptGroup(
            slot=slot,
            prompt_id=str(row["id"]),
            prompt_tokens=tuple(self._task.format_prompt(row, self._tokenizer)),
            row=row,
            num_responses=self._num_responses,
            seed=_request_seed(self._seed, slot * max(self._num_responses, 1)),
            teacher=row.get("teacher", DEFAULT_TEACHER),
            privileged_prompt_tokens=tuple(privileged),
        )


def _request_seed(seed: int, index: int) -> int:
    """A sampling seed below 2**62, well apart for neighbouring runs and requests."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 2)


def prompt_stream(
    config: Config,
    path: str,
    num_responses: int,
    *,
    shuffled: bool,
    golden: Mapping[str, str] | None = None,
    attempt: int = 0,
) -> PromptStream:
    """The rows of a file, rendered by the run's task with the student's tokenizer."""
    rows = read_prompts(path, need_answer=False)  # preflight has asked for them where they are needed
    return PromptStream(
        rows,
        task=get_task(config.data.task),
        tokenizer=load_tokenizer(config.student.path),
        order=Shuffled(len(rows), config.seed) if shuffled else None,
        num_responses=num_responses,
        seed=config.seed + 1_000_003 * attempt if shuffled else 0,
        golden=golden,
    )
