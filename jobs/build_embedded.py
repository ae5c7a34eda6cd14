"""Builds the embedded teacher and a student from nothing, measures both, and ships the teacher if it passes.

    python jobs/build_embedded.py [--seed 200] [--student-seed 100] [--output opd_ray/embedded/assets/chain_teacher]
    python jobs/build_embedded.py --hard [--student-seed 100]
    python jobs/build_embedded.py --pairs

About three minutes on one core.  Exit code 0: both passed and the teacher was written; 1: a gate failed and
nothing was.  Needed only after a change of the task or of the recipe in `opd_ray/embedded/models.py`.  --hard measures
the models of the harder setting, --pairs the teacher with another tokenizer, which nobody ships: they are made where
they are asked for, the harder ones from the shipped teacher.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads are slower on matrices this small

import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from click.core import ParameterSource

from opd_ray.embedded import models as embedded_models
from opd_ray.embedded import prepare as embedded
from opd_ray.embedded.models import PAIRS, SINGLE, copy_probe, measure
from opd_ray.progress import terminal_progress
from opd_ray.tasks import chain

NUM_PROBLEMS = 512  # of the validation split; test stays for reports
MAX_BYTES = 1_000_000  # of everything that ships

Gate = tuple[str, float, float, float]  # (what, measured, at least, at most)


def teacher_gates(model, problems, chains, alphabet=SINGLE) -> Iterator[Gate]:
    """The teacher solves the task, sees errors, doubts itself a little, and copies what repeats."""
    (greedy, _), (sampled, truncated) = (measure(model, problems, at, chains, alphabet) for at in (0.0, 1.0))
    yield "greedy accuracy", greedy, 0.99, 1.0
    shipped = chains == chain.SHORT and alphabet is SINGLE
    yield "sampled accuracy", sampled, 0.88 if shipped else 0.85, 1.0
    yield "own truncation at T = 1", truncated, 0.0, 0.06
    few = problems[:128]
    yield "sees a wrong step", copy_probe(model, few, 0, False, alphabet)[1], 0.85, 1.0
    yield "doubts a right step", copy_probe(model, few, 0, True, alphabet)[1], 0.03, 0.12
    yield "goes on doubting after 5 copies", copy_probe(model, few, 5, True, alphabet)[1], 0.85, 1.0
    yield "copies a wrong try, none before", copy_probe(model, few, 0, False, alphabet)[0], 0.0, 0.03
    yield "copies a wrong try after 5 copies", copy_probe(model, few, 5, False, alphabet)[0], 0.5, 1.0


def student_gates(model, problems, chains) -> Iterator[Gate]:
    """The student has begun to add and multiply, has much to learn, and ends its answers."""
    (greedy, _), (sampled, truncated) = (measure(model, problems, temperature, chains) for temperature in (0.0, 1.0))
    hard = chains == chain.LONG
    yield "greedy accuracy", greedy, 0.10 if hard else 0.30, 0.60 if hard else 0.85
    yield "sampled accuracy", sampled, 0.05 if hard else 0.20, 0.30 if hard else 0.50
    yield "truncation at T = 1", truncated, 0.0, 0.03


def passes(title: str, gates: Iterator[Gate]) -> bool:
    """Prints every measurement beside its bounds."""
    print(title)
    all_pass = True
    for what, measured, low, high in gates:
        ok = low <= measured <= high
        all_pass &= ok
        print(f"  {'ok  ' if ok else 'FAIL'} {what}: {measured:.3f} (from {low:g} to {high:g})", flush=True)
    return all_pass


def _check_all_is_read(hard: bool, pairs: bool) -> None:
    """Raises UsageError for an option that says nothing about the models that are measured."""
    which = "--pairs" if pairs else "--hard"
    unread = ("hard", "student_seed", "seed", "output") if pairs else ("seed", "output") if hard else ()
    for name in unread:
        if click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} beside {which}: nothing of it would be read; leave one of them out")


@click.command()
@click.option(
    "--seed",
    default=200,
    show_default=True,
    help="Seed of the teacher; with this one both phase transitions come early.",
)
@click.option("--student-seed", default=100, show_default=True, help="Seed of the student that is measured.")
@click.option("--output", type=click.Path(path_type=Path), default=embedded.TEACHER_DIR, help="Where the teacher goes.")
@click.option("--hard", is_flag=True, help="Measure the models of the harder setting, and write nothing.")
@click.option("--pairs", is_flag=True, help="Measure the teacher with another tokenizer, and write nothing.")
def main(seed: int, student_seed: int, output: Path, hard: bool, pairs: bool) -> None:
    """Build the embedded teacher and a student, and measure both."""
    _check_all_is_read(hard, pairs)
    if pairs:
        problems = chain.draw_distinct(random.Random("build"), "validation", NUM_PROBLEMS)
        with terminal_progress() as report:
            teacher = embedded_models.build_teacher(embedded.PAIRS_SEED, report, PAIRS)
        sys.exit(not passes("teacher of pairs", teacher_gates(teacher, problems, chain.SHORT, PAIRS)))
    chains = chain.LONG if hard else chain.SHORT
    problems = chain.draw_distinct(random.Random("build"), "validation", NUM_PROBLEMS, chains)
    with terminal_progress() as report:
        shipped = embedded_models.load(embedded.TEACHER_DIR) if hard else None
        teacher = embedded_models.lengthen(shipped, report) if shipped else embedded_models.build_teacher(seed, report)
    with terminal_progress() as report:
        student = embedded_models.build_student(student_seed, report, chains)
    whose = "the harder setting" if hard else f"seed {seed}"
    good_teacher = passes(f"teacher, {whose}", teacher_gates(teacher, problems, chains))
    good_student = passes(f"student, seed {student_seed}", student_gates(student, problems, chains))
    if not (good_teacher and good_student):
        sys.exit("a gate failed: nothing was written")
    if hard:
        return
    with tempfile.TemporaryDirectory() as directory:
        embedded_models.save(teacher, Path(directory))
        num_bytes = sum(file.stat().st_size for file in Path(directory).iterdir())
        if num_bytes > MAX_BYTES:
            sys.exit(f"the teacher takes {num_bytes:,} bytes, more than {MAX_BYTES:,}: nothing was written")
        output.mkdir(parents=True, exist_ok=True)
        for file in Path(directory).iterdir():
            shutil.copyfile(file, output / file.name)  # also makes the file readable for every user
    print(f"{output}: {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
