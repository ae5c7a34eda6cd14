"""A study: the same students under several arms and seeds, one run after another in the same rooms.

What a study consists of is a YAML file (:mod:`opd_ray.study.reading`). Every run is an ordinary run directory,
``STUDY/ARM/seed-N``; a study that was interrupted goes on with the runs that have no summary yet. Each seed's student
is evaluated once, before its first arm.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import GuardStopped, InputError, RunError
from opd_ray.evaluation.scores import Evaluation
from opd_ray.models import hub
from opd_ray.placement.capacity import check_fits
from opd_ray.placement.session import Session, cluster
from opd_ray.placement.wanted import Wanted
from opd_ray.report.arms import clock
from opd_ray.run import preflight
from opd_ray.run.summary import outcome
from opd_ray.run.train import train
from opd_ray.study import teacher_data
from opd_ray.study.arms import Arm


def shared_rooms(arms: Sequence[Arm], seed: int) -> Wanted:
    """The rooms that any of the arms needs; they serve all. Raises InputError where arms differ in what rooms are
    started with."""
    configured = [arm.config(seed) for arm in arms]
    wanted = Wanted.of(configured)
    for config in configured:
        once = [  # each seed's student is evaluated once, for all arms
            (f"evaluation.{field}", getattr(wanted.first.evaluation, field), getattr(config.evaluation, field))
            for field in ("num_problems", "temperature", "sets")
        ]
        for field, theirs, ours in [*wanted.unlike(config), *once]:
            if ours != theirs:
                raise InputError(
                    f"study: {field} is {ours} in arm '{config.name}' and {theirs} in '{wanted.whose(field).name}', "
                    "but arms run in the same rooms; set it under common"
                )
    return wanted


def run_study(arms: Sequence[Arm], seeds: Sequence[int], directory: Path, say: Callable[[str], None]) -> None:
    """Runs every arm on every seed that has no summary in ``directory`` yet.

    An arm whose run fails is reported and ends the study: its log.txt says why.
    """
    wanted = shared_rooms(arms, seeds[0])
    directory.mkdir(parents=True, exist_ok=True)
    runs = [(seed, arm) for seed in seeds for arm in arms if seed in arm.seeds(seeds)]
    for arm in arms:
        _check_same(directory, arm)
    todo = [(seed, arm) for seed, arm in runs if arm.summary(directory, seed) is None]
    say(f"{len(arms)} arms on {len(seeds)} seeds: {len(runs) - len(todo)} runs are done, {len(todo)} to go")
    if not todo:
        return
    commits = _commits_of(directory, [(seed, arm) for seed, arm in runs if arm.summary(directory, seed)])
    with cluster():
        check_fits(preflight.check_rooms, wanted)
        teacher = _teacher_data(directory, arms, seeds[0], commits, say)
        # What is wrong with the last arm is said before the first one runs.
        configured = [resolve(_config(arm, seeds[0], teacher)) for arm in arms]
        facts = []
        for config in configured:
            facts.append(preflight.check_files(hub.pinned(config, commits)))
            commits |= facts[-1].commits
        pinned = [hub.pinned(config, commits) for config in configured]
        for config in pinned:
            preflight.check_weights(config)
        for seed in dict.fromkeys(seed for seed, _ in todo):
            resolve(arms[0].config(seed))  # builds its student, if it is an embedded one
        session = Session(*pinned, max_context_tokens=max(each.max_context_tokens for each in facts))
        began = time.monotonic()
        try:
            for done, (seed, arm) in enumerate(todo):
                each = (time.monotonic() - began) / max(1, done)
                left = f", about {clock(each * (len(todo) - done))} left" if done else ""
                say(f"run {done + 1}/{len(todo)}: {arm.name}, seed {seed}{left}")
                before = _before(directory, arms, seed)
                _run_arm(directory, arm, seed, before, teacher, commits, session)
                say(f"    {_outcome(arm.summary(directory, seed))}")
        finally:
            session.close()


def _commits_of(directory: Path, done: Sequence[tuple[int, Arm]]) -> dict[str, str]:
    """Of the models of the Hub in runs that are done: all runs of a study have the same."""
    found: dict[str, str] = {}
    for seed, arm in done:
        path = arm.run_directory(directory, seed) / "config.yaml"
        if path.is_file():
            found |= hub.commits_of(arm.config(seed), OmegaConf.to_container(OmegaConf.load(path)))
    return found


def _run_arm(
    directory: Path,
    arm: Arm,
    seed: int,
    before: Evaluation | None,
    teacher: teacher_data.Rollouts | None,
    commits: Mapping[str, str],
    session: Session,
) -> None:
    run_dir = arm.run_directory(directory, seed)
    shutil.rmtree(run_dir, ignore_errors=True)  # what an interrupted study left there has no summary
    run_dir.mkdir(parents=True)
    (run_dir / "arm.json").write_text(json.dumps(arm.raw) + "\n")
    config = hub.pinned(_config(arm, seed, teacher), commits)
    with (run_dir / "log.txt").open("w", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            train(config, run_dir, session=session, before=before)
        except GuardStopped:
            pass  # an outcome, with a summary
        except RunError as error:
            raise RunError(f"study: arm '{arm.name}', seed {seed}: {error} (see {run_dir / 'log.txt'})") from None


def _config(arm: Arm, seed: int, teacher: teacher_data.Rollouts | None) -> Config:
    """The arm's, ``teacher-rollouts:N`` replaced by a file of N of them."""
    config = arm.config(seed)
    if teacher is None or not arm.teacher_rollouts:
        return config
    golden = str(teacher.subset(arm.teacher_rollouts))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, golden=golden))


def _check_same(directory: Path, arm: Arm) -> None:
    """Refuses a finished run that was made with other settings, whatever its seed: a table must not mix the two."""
    for saved in sorted((directory / arm.directory).glob("seed-*/arm.json")):
        seed = int(saved.parent.name.removeprefix("seed-"))
        made = json.loads(saved.read_text()) if arm.summary(directory, seed) else None
        if made not in (None, json.loads(json.dumps(arm.raw))):
            raise InputError(
                f"study: {saved.parent} was made with other settings of arm '{arm.name}' (see its arm.json); "
                "give another --dir, or delete it"
            )


def _before(directory: Path, arms: Sequence[Arm], seed: int) -> Evaluation | None:
    """The evaluation of a seed's student, where one of the arms has made it already; what else lies in the directory
    may have asked other problems."""
    made = (summary["eval_before"] for arm in arms if (summary := arm.summary(directory, seed)))
    return next((Evaluation.of(before) for before in made if before), None)


def _teacher_data(
    directory: Path, arms: Sequence[Arm], seed: int, commits: dict[str, str], say: Callable[[str], None]
) -> teacher_data.Rollouts | None:
    """Raw rollouts of the teacher, for arms that train on them and for its own truncation; made once. Adds to
    ``commits`` those of models of the Hub that it finds."""
    asks = max(arms, key=lambda arm: arm.teacher_rollouts)
    if not (count := asks.teacher_rollouts):
        return None
    # Of an arm that has its teacher, and whose golden file does not wait for these, where there is one.
    alike = (arm for arm in arms if not arm.teacher_rollouts and arm.raw.get("teacher") == asks.raw.get("teacher"))
    ready = next(alike, asks.without_golden())
    config = hub.pinned(resolve(ready.config(seed)), commits)
    path = directory / f"teacher-rollouts-{count}.parquet"
    noted = path.with_suffix(".json")
    if path.exists():
        commits |= {**json.loads(noted.read_text()), **commits} if noted.exists() else {}
    else:
        say(f"sampling {count} rollouts of the teacher")
        facts = preflight.check_files(config)
        commits |= facts.commits
        noted.write_text(json.dumps(commits) + "\n")
        asyncio.run(teacher_data.sample(hub.pinned(config, commits), facts, path, count))
    return teacher_data.Rollouts(path)


def _outcome(summary: Mapping[str, Any] | None) -> str:
    return f"{outcome(summary)}, highest truncation {summary['max_truncation_rate']:.2f}" if summary else "no summary"
