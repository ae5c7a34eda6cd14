"""Runs a configuration from start to end: connect, check, start the rooms, run the pipeline, write the results."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import RunError, Terminated
from opd_ray.evaluate import Evaluation
from opd_ray.placement.capacity import cluster_capacity
from opd_ray.placement.session import Session, cluster
from opd_ray.report import write_run_report
from opd_ray.run import preflight, resuming
from opd_ray.run.driver import Driver
from opd_ray.snapshots import Checkpoint, Shelf, Storage
from opd_ray.snapshots.runners import runner
from opd_ray.watch.observers import Observer


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
        except Terminated:
            if session is None:
                _try_report(run_dir)
            raise
        finally:
            if session is None:
                own.close()
    if session is None:
        write_run_report(run_dir)
    if stopped:
        raise RunError(stopped)
    return result


def _try_report(run_dir: Path) -> None:
    """The report of a run that is stopped; one that cannot be written changes nothing about how the run ends."""
    try:
        write_run_report(run_dir)
    except Exception as error:
        print(f"{run_dir}: report.html was not written: {error}", flush=True)


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
