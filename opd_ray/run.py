"""Runs a configuration from start to end: connect, check, start the rooms, run the pipeline, write the results."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray import embedded, launch, preflight, resuming
from opd_ray.capacity import cluster_capacity
from opd_ray.checkpoint import Checkpoint, Shelf, Storage
from opd_ray.config import Config
from opd_ray.driver import Driver
from opd_ray.errors import InputError, RunError
from opd_ray.evaluate import Evaluation
from opd_ray.evaluate import evaluate as run_evaluation
from opd_ray.golden import is_privileged
from opd_ray.materials import prompt_stream
from opd_ray.pipeline import Observer
from opd_ray.preflight import Preflight
from opd_ray.report import write_run_report
from opd_ray.runners import runner
from opd_ray.session import Session, cluster, new_namespace


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    auto_resume: bool = False,
    observers: tuple[Observer, ...] = (),
    session: Session | None = None,
    before: Evaluation | None = None,
) -> dict[str, Any]:
    """Trains as configured and returns the summary, which is also ``run_dir/summary.json``.

    ``resume`` goes on with the run in ``run_dir``, ``auto_resume`` also with one whose checkpoints alone are left.
    With a ``session`` the run takes place in its rooms, which stay up, and leaves the report to whoever compares the
    session's runs; ``before`` is the student's evaluation where it is known already. Raises InputError before a model
    loads or a file is written, RunError for a failure while running and, once everything is written, where the
    guard stopped the run.
    """
    resuming.check_run_dir(run_dir, config, resume)
    config = resolve(config)
    facts = preflight.check_files(config)
    with cluster() as dashboard:
        preflight.check_resources(config, cluster_capacity)
        shelf, start = find_start(config, run_dir, resume=resume or auto_resume)
        run_dir.mkdir(parents=True, exist_ok=True)
        saved = run_dir / ".config.yaml.partial"
        saved.write_text(configs.to_yaml(config))
        saved.rename(run_dir / "config.yaml")
        if dashboard:
            print(f"dashboard: http://{dashboard}")
        print(f"run directory: {run_dir}\nmethod: {config.method}, seed {config.seed}", flush=True)
        own = session or Session()
        try:
            driver = Driver(config, facts, run_dir, own, shelf, observers)
            result, stopped = asyncio.run(driver.train(start, before, continued=resume or start is not None))
        finally:
            if session is None:
                own.close()
    if session is None:
        write_run_report(run_dir)
    if stopped:
        raise RunError(stopped)
    return result


def find_start(config: Config, run_dir: Path, *, resume: bool) -> tuple[Shelf, Checkpoint | None]:
    """Where the checkpoints of a run go, and the one to resume from, if there is one. Needs a connection to Ray.

    Raises InputError where checkpoints cannot be written, or the newest is damaged or of another run.
    """
    storage = Storage(config.checkpoint.directory or run_dir / "checkpoints")
    shelf = Shelf(storage, runner(local=storage.is_local, deadline_s=config.deadlines.train_s))
    start = shelf.check(resume=resume)
    if start:
        resuming.check_same_run(f"the checkpoint {start.where}", start.state["config"], config)
    return shelf, start


def resolve(config: Config) -> Config:
    """Replaces what stands for the embedded models and data by their paths, building them where needed."""
    config = _without_foreign_golden(config)
    data = config.data
    golden = str(data.golden).partition(":")[0]
    if configs.EMBEDDED in (config.student.path, data.prompts, golden, data.evaluation):
        paths = embedded.prepare(config.seed)

        def path(value: str | None, built: Path) -> str | None:
            return str(built) if value == configs.EMBEDDED else value

        config = dataclasses.replace(
            config,
            student=dataclasses.replace(config.student, path=path(config.student.path, paths.student)),
            data=dataclasses.replace(
                data,
                prompts=path(data.prompts, paths.prompts),
                golden=_golden(data.golden, paths.golden, config.seed),
                evaluation=path(data.evaluation, paths.test),
            ),
        )

    stand_ins = {configs.STUDENT: config.student.path, configs.EMBEDDED: str(embedded.TEACHER_DIR)}

    def scorer(section: Any) -> Any:
        return dataclasses.replace(section, path=stand_ins.get(section.path, section.path))

    return dataclasses.replace(
        config,
        teacher=scorer(config.teacher),
        more_teachers={name: scorer(teacher) for name, teacher in config.more_teachers.items()},
        reference=scorer(config.reference),
    )


def _without_foreign_golden(config: Config) -> Config:
    """The embedded golden solutions answer the embedded prompts: never mixed into other data."""
    data = config.data
    if data.prompts == configs.EMBEDDED or not str(data.golden).startswith(configs.EMBEDDED):
        return config
    if config.uses_golden or is_privileged(config):
        raise InputError(
            f"data.prompts is {data.prompts}, but data.golden is the embedded one, of another task; "
            "give data.golden=FILE, or leave golden rollouts out: loss.golden.coef=0 buffer.golden_per_prompt=0"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, golden=None))


def _golden(value: str | None, built: Path, seed: int) -> str | None:
    """A golden file: as given, the embedded one, or as many embedded solutions as "embedded:N" asks for."""
    kind, _, count = str(value).partition(":")
    if kind != configs.EMBEDDED or value is None:
        return value
    if not count:
        return str(built)
    if not count.isdigit() or not 0 < int(count) <= embedded.MOST_GOLDEN:
        raise InputError(f"data.golden={value}: expected embedded:N with N from 1 to {embedded.MOST_GOLDEN}")
    return str(embedded.golden_file(seed, int(count)))


def evaluate(checkpoint_dir: str, config: Config) -> dict[str, Any]:
    """Held-out accuracy of a checkpoint, as a run measures it."""
    if config.evaluation.num_problems == 0:
        raise InputError("evaluation.num_problems is 0: there is nothing to evaluate; set it to 1 or more")
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=checkpoint_dir))
    if config.data.evaluation == configs.EMBEDDED:
        config = resolve(config)
    facts = preflight.check_evaluation(config)
    with cluster():
        preflight.check_generators(config, cluster_capacity)
        return dataclasses.asdict(asyncio.run(_evaluate_alone(config, facts)))


async def _evaluate_alone(config: Config, facts: Preflight) -> Evaluation:
    pool = launch.start_generators(
        config, namespace=new_namespace(), max_context_tokens=facts.max_context_tokens, alone=True
    )
    try:
        await pool.up(config.deadlines.start_s)
        problems = prompt_stream(config, config.data.evaluation, 1, shuffled=False)
        most = min(config.evaluation.num_problems, len(problems))
        return await run_evaluation(pool, problems, most, config, facts.eos_token_ids)
    finally:
        launch.stop(pool)
