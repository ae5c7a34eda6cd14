"""``opd-ray evaluate``: held-out accuracy of a checkpoint, without a run."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError
from opd_ray.evaluation import Evaluation
from opd_ray.evaluation import evaluate as run_evaluation
from opd_ray.placement.capacity import check_fits
from opd_ray.placement.session import cluster
from opd_ray.run import preflight
from opd_ray.run.preflight import Preflight


def evaluate(checkpoint_dir: str, config: Config) -> dict[str, Any]:
    """Held-out accuracy of a checkpoint, as a run measures it."""
    if config.evaluation.num_problems == 0:
        raise InputError("evaluation.num_problems is 0: there is nothing to evaluate; set it to 1 or more")
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=checkpoint_dir))
    if config.data.evaluation == configs.EMBEDDED:
        config = resolve(config)
    facts = preflight.check_evaluation(config)
    with cluster():
        check_fits(preflight.check_generators, config)
        return dataclasses.asdict(asyncio.run(_evaluate_alone(config, facts)))


async def _evaluate_alone(config: Config, facts: Preflight) -> Evaluation:
    from opd_ray.placement import launch  # torch: what is refused needs none

    pool = launch.start_generators(config, facts.max_context_tokens, alone=True)
    try:
        await pool.up(config.deadlines.start_s)
        problems = facts.data.problem_stream()
        most = min(config.evaluation.num_problems, len(problems))
        return await run_evaluation(pool, problems, most, config, facts.eos_token_ids)
    finally:
        pool.stop()
