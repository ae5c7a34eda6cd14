"""Runs a configuration from start to end: connect, check, start the rooms, run the pipeline, write the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.disk import private, whole
from opd_ray.embedded.resolve import resolve, without_foreign_golden
from opd_ray.errors import GuardStopped, InputError, Terminated, only_said
from opd_ray.evaluation.scores import Evaluation
from opd_ray.models import hub
from opd_ray.placement.capacity import check_fits
from opd_ray.placement.nodes import nodes
from opd_ray.placement.session import Session, cluster
from opd_ray.plan.snapshots import with_room
from opd_ray.report import write_report
from opd_ray.run import preflight, resuming, signals
from opd_ray.run.card import write_card
from opd_ray.snapshots import Checkpoint, Lease, Shelf, Storage
from opd_ray.snapshots.calls import FileCalls
from opd_ray.watch.observers import Observer


def train(
    config: Config,
    run_dir: str | Path,
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
    loads or a file is written, RunError for a failure while running and, once everything is written, GuardStopped
    where the guard stopped the run.

    It may be called where an event loop is running, in a notebook: that waits.
    """
    run_dir = Path(run_dir).absolute()
    given = resuming.check_run_dir(run_dir, config, resume)
    asked, config, facts = checked(given)
    with cluster() as dashboard, private():
        check_fits(preflight.check_resources, config)
        shelf, start = find_start(given, run_dir, resume=resume or auto_resume)
        own = session or Session()
        try:
            as_before = resuming.with_commits(given, start.state["config"]) if start else given
            if hub.pinned(as_before, facts.commits) != asked:  # its checkpoints alone were left, and a branch has moved
                asked, config, facts = checked(as_before)
            config, said = with_room(config, facts, nodes())
            if said:
                print(said, flush=True)
            from opd_ray.run.driver import Driver  # not above: torch takes seconds to import, and no refusal needs it

            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--run-dir {run_dir}: cannot be made ({error.strerror}); give another") from None
            continued = (run_dir / "config.yaml").exists() or start is not None
            with whole(run_dir / "config.yaml") as saved:
                # As asked for, "embedded" and all: what that stands for lies, in a job, in a copy that goes with it. Of
                # models of the Hub the commits: with these the run goes on.
                saved.write_text(configs.to_yaml(without_foreign_golden(asked)))
            if dashboard:
                print(f"dashboard: http://{dashboard}")
            print(f"run directory: {run_dir}\nmethod: {config.method}, seed {config.seed}", flush=True)
            driver = Driver(config, facts, run_dir, own, shelf, observers, start, before)
            result, stopped = signals.run(driver.train(continued=continued))
            write_card(run_dir / "student", run_dir)
        except Terminated:
            if session is None:
                with only_said(f"{run_dir}: report.html was not written"):
                    write_report([run_dir], run_dir / "report.html")
            raise
        finally:
            shelf.lease.release()
            if session is None:
                own.close()
    if session is None:
        with private():
            write_report([run_dir], run_dir / "report.html")
    if stopped:
        raise GuardStopped(stopped)
    return result


def checked(given: Config) -> tuple[Config, Config, preflight.Preflight]:
    """What was asked for and what it stands for, both with the commits of models of the Hub, once all is looked at."""
    config = resolve(given)
    facts = preflight.check_files(config)
    config = hub.pinned(config, facts.commits)
    preflight.check_weights(config)
    return hub.pinned(given, facts.commits), config, facts


def find_start(config: Config, run_dir: Path, *, resume: bool, hold: bool = True) -> tuple[Shelf, Checkpoint | None]:
    """Where the checkpoints of a run go, and the one to resume from, if there is one. Needs a connection to Ray. With
    ``hold`` nobody else writes there until the shelf is released.

    ``config`` is what was asked for, not resolved: a checkpoint may have been written where the package lay elsewhere,
    and of models of the Hub it says which commits the run has.
    Raises InputError where checkpoints cannot be written, another driver writes them, or the newest is damaged or of
    another run.
    """
    run_dir = run_dir.absolute()
    storage = Storage(config.checkpoint.location(run_dir))
    # A run directory may be moved together with the checkpoints in it.
    inside = storage.is_local and Path(storage.location).is_relative_to(run_dir)
    lease = Lease(storage, "that of the directory around it" if inside else str(run_dir))
    shelf = Shelf(storage, FileCalls(local=storage.is_local, deadline_s=config.deadlines.train_s), lease)

    def look() -> Checkpoint | None:
        start = shelf.check(resume=resume)
        if start:
            saved = start.state["config"]
            resuming.check_same_run(f"the checkpoint {start.where}", saved, resuming.with_commits(config, saved))
        return start

    start = look()
    if hold:
        lease.take()
        try:
            start = look()  # the driver before may have written one more, or another run its first
            shelf.tidy(config.checkpoint.keep)  # it may have been killed before it deleted the oldest
        except InputError:
            lease.release()
            raise
    return shelf, start
