"""``opd-ray evaluate``: held-out accuracy of a checkpoint, without a run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.evaluate import evaluate as ask
from opd_ray.evaluation.scores import Evaluation
from opd_ray.evaluation.verdicts import Difference
from opd_ray.models.checkpoints import locate
from opd_ray.placement.capacity import check_fits
from opd_ray.placement.session import cluster
from opd_ray.run import preflight, signals
from opd_ray.run.export import run_of, student_in
from opd_ray.run.preflight import Preflight
from opd_ray.watch.observers import EvaluationProgress


def settings(checkpoint: str, config_file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """What a checkpoint is evaluated with: of a run, what it was trained with, unless a file or overrides say
    otherwise."""
    run_dir = run_of(Path(checkpoint))
    if config_file is None and run_dir is None:  # a model of one's own: nothing of the embedded ones is for it
        overrides = (f"student.path={checkpoint}", *overrides)
    return configs.load(config_file or (run_dir and run_dir / "config.yaml"), overrides, evaluation_only=True)


def evaluate(checkpoint: str | Path, config: Config | None = None) -> dict[str, Any]:
    """Held-out accuracy of a checkpoint, as a run measures it.

    ``checkpoint`` is a model in Hugging Face format, or a run directory or one of its checkpoints/step-N, which stand
    for their student; of a run, problems and settings are the run's unless ``config`` is given. Raises InputError
    before a model loads.
    """
    (found,) = measured([str(checkpoint)], config or settings(str(checkpoint)))
    return found.saved()


def compared(checkpoint: str, against: str, config: Config) -> tuple[Evaluation, dict[str, Difference]]:
    """The evaluation of a checkpoint, and by set its paired difference to another, which is evaluated in the same way,
    or to the verdicts in a directory."""
    if not verdicts.are_in(Path(against)):
        found, other = measured([checkpoint, against], config)
        return found, verdicts.compare(found.verdicts, other.verdicts, against)
    kept = verdicts.read(Path(against))
    verdicts.check_common(config.evaluation_sets, kept, against)
    (found,) = measured([checkpoint], config)
    return found, verdicts.compare(found.verdicts, kept, against)


def measured(checkpoints: Sequence[str], config: Config) -> list[Evaluation]:
    """As ``evaluate``, of each checkpoint, with the verdicts that the scores are made of."""
    with contextlib.ExitStack() as stack:
        students = [stack.enter_context(student_in(checkpoint)) for checkpoint in checkpoints]
        # Before embedded problems are made for them.
        students = [locate(f"CHECKPOINT={student}", student) for student in students]
        return [_measured(student, config) for student in students]


def _measured(checkpoint_dir: str, config: Config) -> Evaluation:
    if not config.evaluation_sets:
        raise InputError("evaluation.num_problems is 0: there is nothing to evaluate; set it to 1 or more")
    if configs.EMBEDDED in {each.path for each in config.evaluation_sets.values()}:
        config = resolve(config)  # which goes by the student of the settings: of whose problems they are
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=checkpoint_dir))
    facts = preflight.check_evaluation(config)
    preflight.check_weights(config, evaluation_only=True)
    with cluster():
        check_fits(preflight.check_generators, config)
        return signals.run(_evaluate_alone(config, facts))


async def _evaluate_alone(config: Config, facts: Preflight) -> Evaluation:
    from opd_ray.placement import launch  # torch: what is refused needs none

    pool = launch.start_generators(config, facts.max_context_tokens, alone=True)
    try:
        await pool.up(config.deadlines.start_s)
        problems = facts.data.problem_streams()
        return await ask(pool, problems, config, facts.eos_token_ids, tell=EvaluationProgress(to=sys.stderr))
    finally:
        pool.stop()
