"""A study: the same students under several arms and seeds, one run after another in the same rooms.

A study is a YAML file: ``common`` settings, ``arms`` by name with what each changes (and ``seeds``, where it runs on
the first few only), and ``claims`` about what they should show (jobs/ablation.yaml, :mod:`opd_ray.study.claims`).
Every run is an ordinary run directory, ``STUDY/ARM/seed-N``; a study that was interrupted goes on with the runs
that have no summary yet. Each seed's student is evaluated once, before its first arm.
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
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import GuardStopped, InputError, RunError
from opd_ray.evaluation.scores import Evaluation
from opd_ray.models import hub
from opd_ray.placement.session import Session, cluster, unlike
from opd_ray.report.arms import clock
from opd_ray.run import preflight
from opd_ray.run.summary import outcome
from opd_ray.run.train import train
from opd_ray.study import claims, teacher_data
from opd_ray.study.arms import Arm


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says."""

    arms: list[Arm]
    claims: list[Mapping[str, Any]]


def read_study(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """A study file; ``overrides`` hold for all arms, ``only`` picks some by name or directory."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except OSError as error:
        raise InputError(f"study {path}: {error.strerror}; give an existing YAML file") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("arms"), dict) or set(raw) - {"common", "arms", "claims"}:
        raise InputError(f"study {path}: expected 'arms', a mapping of names to settings; beside it common, claims")
    arms = []
    for name, own in raw["arms"].items():
        own = dict(own or {})
        num_seeds = own.pop("seeds", None)
        if num_seeds is not None and (not isinstance(num_seeds, int) or num_seeds < 1):
            raise InputError(f"study {path}: arm '{name}': seeds is {num_seeds!r}, expected how many: 1 or more")
        merged = OmegaConf.merge(raw.get("common") or {}, own, changes)
        arms.append(Arm(name, OmegaConf.to_container(merged), num_seeds))
    known = {name: arm for arm in arms for name in (arm.name, arm.directory)}
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"study {path}: no arm '{unknown[0]}'; it has {', '.join(arm.directory for arm in arms)}")
    chosen = [arm for arm in arms if not only or arm in [known[name] for name in only]]
    for arm in chosen:
        _ = arm.teacher_rollouts  # refuses a contradiction before anything starts
    stated = raw.get("claims") or []
    claims.check(stated, [arm.name for arm in arms])
    return Study(chosen, stated)


def shared_rooms(arms: Sequence[Arm], seed: int) -> Config:
    """The configuration of an arm that needs every room that any of them needs; its rooms serve all.

    Raises InputError where no arm does, or where arms differ in what rooms are started with.
    """
    configured = {arm.name: arm.config(seed) for arm in arms}
    rooms = {
        name: {*config.scorers, *["teacher_generate"] * config.buffer.uses_teacher_rollouts}
        for name, config in configured.items()
    }
    everything = set().union(*rooms.values())
    widest = next((name for name in configured if rooms[name] == everything), None)
    if widest is None:
        raise InputError(
            f"study: the arms need {', '.join(sorted(everything))}, but no single arm needs all of them; "
            "arms run in the same rooms, so add one that does, or split the study"
        )
    for name, config in configured.items():
        first = configured[widest]
        once = [  # each seed's student is evaluated once, for all arms
            (f"evaluation.{field}", getattr(first.evaluation, field), getattr(config.evaluation, field))
            for field in ("num_problems", "temperature", "sets")
        ]
        for field, theirs, ours in [*unlike(first, config), *once]:
            if ours != theirs:
                raise InputError(
                    f"study: {field} is {ours} in arm '{name}' and {theirs} in '{widest}', but arms run in the same "
                    "rooms; set it under common"
                )
    return configured[widest]


def run_study(arms: Sequence[Arm], seeds: Sequence[int], directory: Path, say: Callable[[str], None]) -> None:
    """Runs every arm on every seed that has no summary in ``directory`` yet.

    An arm whose run fails is reported and ends the study: its log.txt says why.
    """
    rooms_for = shared_rooms(arms, seeds[0])
    directory.mkdir(parents=True, exist_ok=True)
    runs = [(seed, arm) for seed in seeds for arm in arms if seed in arm.seeds(seeds)]
    for seed, arm in runs:
        _check_same(directory, arm, seed)
    todo = [(seed, arm) for seed, arm in runs if arm.summary(directory, seed) is None]
    say(f"{len(arms)} arms on {len(seeds)} seeds: {len(runs) - len(todo)} runs are done, {len(todo)} to go")
    if not todo:
        return
    commits = _commits_of(directory, [(seed, arm) for seed, arm in runs if arm.summary(directory, seed)])
    with cluster():
        teacher = _teacher_data(directory, arms, rooms_for, commits, say)
        # What is wrong with the last arm is said before the first one runs.
        configured = [resolve(_config(arm, seeds[0], teacher)) for arm in arms]
        facts = []
        for config in configured:
            facts.append(preflight.check_files(hub.pinned(config, commits)))
            commits |= facts[-1].commits
        for config in configured:
            preflight.check_weights(hub.pinned(config, commits))
        rooms_for = hub.pinned(rooms_for, commits)
        for seed in dict.fromkeys(seed for seed, _ in todo):
            resolve(dataclasses.replace(rooms_for, seed=seed))  # builds its student, if it is an embedded one
        session = Session(resolve(rooms_for), max(each.max_context_tokens for each in facts))
        began = time.monotonic()
        try:
            for done, (seed, arm) in enumerate(todo):
                each = (time.monotonic() - began) / max(1, done)
                left = f", about {clock(each * (len(todo) - done))} left" if done else ""
                say(f"run {done + 1}/{len(todo)}: {arm.name}, seed {seed}{left}")
                _run_arm(directory, arm, seed, teacher, commits, session)
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
            train(config, run_dir, session=session, before=_before(directory, seed))
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


def _check_same(directory: Path, arm: Arm, seed: int) -> None:
    """Refuses a finished run that was made with other settings: a table must not mix the two."""
    saved = arm.run_directory(directory, seed) / "arm.json"
    made = json.loads(saved.read_text()) if arm.summary(directory, seed) and saved.exists() else None
    if made not in (None, json.loads(json.dumps(arm.raw))):
        raise InputError(
            f"study: {saved.parent} was made with other settings of arm '{arm.name}' (see its arm.json); "
            "give another --dir, or delete it"
        )


def _before(directory: Path, seed: int) -> Evaluation | None:
    """The evaluation of a seed's student, where an arm has made it already."""
    for path in sorted(directory.glob(f"*/seed-{seed}/summary.json")):
        before = json.loads(path.read_text())["eval_before"]
        if before:
            return Evaluation.of(before)
    return None


def _teacher_data(
    directory: Path, arms: Sequence[Arm], rooms_for: Config, commits: dict[str, str], say: Callable[[str], None]
) -> teacher_data.Rollouts | None:
    """Raw rollouts of the teacher, for arms that train on them and for its own truncation; made once. Adds to
    ``commits`` those of models of the Hub that it finds."""
    count = max(arm.teacher_rollouts for arm in arms)
    if not count:
        return None
    config = hub.pinned(resolve(rooms_for), commits)
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
