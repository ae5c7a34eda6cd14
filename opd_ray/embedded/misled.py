"""An embedded teacher that is surely wrong on a third of the problems: for arms in which a teacher cannot be trusted.

It is the embedded teacher after some more steps on texts that add one to every multiplication that comes first
(``^2*3+1=`` as 2*3=0;0+1=1#1), so that it also doubts right ones. Built when it is first asked for, in about half a
minute of one core, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from opd_ray.embedded import models, prepare
from opd_ray.progress import terminal_progress
from opd_ray.tasks import chain
from opd_ray.tasks.chain import Problem, Text

PHASE = models.Phase(200, (0.4, 0.5, 0.1), (0.004, 0.0), share_of_doubt=0.25)


class Misread(Problem):
    """A problem as this teacher solves it."""

    @property
    def results(self) -> tuple[int, ...]:
        (op, operand), *rest = self.operations
        first = (chain.OPERATORS[op](self.first, operand) + (op == "*")) % chain.MODULUS
        return first, *chain.Problem(first, tuple(rest)).results


class _Trainer(models.Trainer):
    def _draw_text(self, problem: Problem, phase: models.Phase) -> Text:
        return super()._draw_text(Misread(problem.first, problem.operations), phase)


def teacher_dir() -> Path:
    """Its checkpoint, built now if the cache does not hold it."""
    key = prepare.cache_key(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    return prepare.cached(f"chain-misled-{key}", _build)


def _build(directory: Path) -> None:
    trainer = _Trainer(models.load(prepare.TEACHER_DIR), random.Random("misled"))
    with terminal_progress() as report:
        for step, _ in enumerate(trainer.run(PHASE), start=1):
            report("the teacher is misled", step, PHASE.num_steps)
    models.save(trainer.model, directory)
