"""May a run write where it is told to, and does ``--resume`` continue the same run? Looked at before a model loads.

Refusals are InputErrors of one line, as those of :mod:`opd_ray.run.preflight`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded import prepare as embedded
from opd_ray.embedded.resolve import without_foreign_golden
from opd_ray.errors import InputError
from opd_ray.models import hub
from opd_ray.status import reasons, state

_COPIES_OF_JOBS = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the working directory of `ray job submit`, within its session's directory."""

_BESIDE_RUNS = ("*.log", "*.txt", "*.out", "*.err", ".*", "lost+found", "arm.json")
"""What may be in the directory of a run before it begins: its output, a file system's own, a study's note."""


def check_run_dir(run_dir: Path, config: Config, resume: bool) -> Config:
    """Refuses to write over another run or where results do not last, and to continue a run as a different one.

    Returns ``config`` as the run goes on with it: a model of the Hub without a revision is of the commit that it has.
    """
    if _COPIES_OF_JOBS in "/".join(run_dir.absolute().parts):
        raise InputError(
            f"--run-dir {run_dir}: lies in the copy of the working directory that Ray makes for a job and deletes "
            "after it, results and all; give an absolute path that outlives the job"
        )
    saved = run_dir / "config.yaml"
    there = next(each for each in (run_dir.absolute(), *run_dir.absolute().parents) if each.exists())
    if not there.is_dir():
        lies = "is" if there == run_dir.absolute() else f"lies in {there}, which is"
        raise InputError(f"--run-dir {run_dir}: {lies} a file; give a new directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--run-dir {run_dir}: {there} may not be written to; give a directory that may")
    if resume and not saved.is_file():
        raise InputError(f"--run-dir {run_dir}: has no run to resume (no config.yaml); leave out --resume to start one")
    if not resume:
        if saved.exists() and not _came_to_nothing(run_dir):
            raise InputError(
                f"--run-dir {run_dir}: holds another run; add --resume to go on with it, or give another name"
            )
        if not saved.exists() and not (run_dir / "checkpoints").exists():  # whose run decides where they do
            _check_free(run_dir)
        return config
    _check_alone(run_dir)
    if _came_to_nothing(run_dir):
        return config
    before = configs.to_dict(configs.load(saved))
    config = with_commits(config, before)
    check_same_run(f"the run in {run_dir}", before, config)
    return config


def with_commits(config: Config, saved: Mapping[str, Any]) -> Config:
    """A model of the Hub that has no revision in ``config`` is of the commit that it has in ``saved``."""
    commits = hub.commits_of(config, saved)
    return hub.pinned(config, {path: its for path, its in commits.items() if "@" not in path})


def _came_to_nothing(run_dir: Path) -> bool:
    """Did the run in it fail before its first step? Then nothing keeps another configuration from being tried there."""
    try:
        last = state.read(run_dir / state.FILE)
    except InputError:
        return False
    return last.phase == "failed" and last.step == 0 and last.checkpoint_step is None


def _check_free(run_dir: Path) -> None:
    """Refuses to mix a run with files of something else; logs of it may be there already."""
    names = sorted(each.name for each in run_dir.iterdir()) if run_dir.is_dir() else []
    if others := [name for name in names if not any(fnmatch.fnmatch(name, kind) for kind in _BESIDE_RUNS)]:
        raise InputError(
            f"--run-dir {run_dir}: is a directory of something else, with {others[0]} in it ({len(others)} such); give "
            "a new or an empty one"
        )


def _check_alone(run_dir: Path) -> None:
    """Refuses a run whose driver still works on it, as far as its status says; the lease of the checkpoints decides."""
    try:
        last = state.read(run_dir / state.FILE)
    except InputError:
        return
    alive, age = reasons.driver_alive(last), abs(time.time() - last.time)
    if not last.ended and last.pid != os.getpid() and (alive or (alive is None and age < state.STALE_S)):
        where = "this machine" if alive else f"{last.host}, which wrote {state.FILE} {age:.1f} s ago,"
        raise InputError(
            f"--run-dir {run_dir}: process {last.pid} on {where} is still working on this run; "
            "wait for it, or end it first"
        )


def check_same_run(where: str, saved: Mapping[str, Any], config: Config) -> None:
    """Refuses to continue what was trained with other models, data or losses; ``saved`` is its configuration, without
    the fields that came later: those had their defaults."""
    with contextlib.suppress(InputError):  # where it is needed, and is of another task: resolve() says so
        config = without_foreign_golden(config)  # as it is saved
    known, absent = dict(configs.leaves(configs.to_dict(config))), {doc.name for doc in configs.describe_absent()}
    there, defaults = dict(configs.leaves(saved)), dict(configs.leaves(configs.to_dict(Config())))
    for name, old, new in configs.differences(saved, config, configs.RUN):
        old = old if name in there else defaults.get(name)
        if old == new:
            continue
        section = name.rpartition(".")[0]
        if name in absent and (section in known or section in there):  # one of the two is without it
            name, old, new = section, _at(saved, section), _at(configs.to_dict(config), section)
        elif name not in known and not name.startswith("more_teachers."):  # which are named by their users
            raise InputError(
                f"--resume: {where} has {name}={_yaml(old)}, a field that this version of opd_ray does not have; "
                "finish the run with the version that began it, or give another --run-dir"
            )
        stands_for = _stands_for(new, old, saved, config.student.path)
        if not (stands_for or (name.endswith(".path") and _is_commit(name, new, old))):
            raise InputError(
                f"--resume: {name} is {_yaml(new)}, but {where} has {_yaml(old)}; "
                f"continue it with {name}={_yaml(old)} or give another --run-dir"
            )


def _at(config: Mapping[str, Any], name: str) -> Any:
    """The value, or the section, of a configuration that has this name."""
    for part in name.split("."):
        config = config[part]
    return config


def _stands_for(new: Any, old: Any, before: Mapping[str, Any], student: str) -> bool:
    """Is ``new`` a stand-in ("embedded", "embedded:N", "student") that the saved run resolved to ``old``, the student
    being that of ``student``?"""
    if new == configs.STUDENT:
        return old == before["student"]["path"]
    kind, _, count = str(new).partition(":")
    if kind not in (*configs.EMBEDDED_STUDENTS, *configs.EMBEDDED_TEACHERS) or not isinstance(old, str):
        return False
    if count:
        return Path(old).name == f"golden-{count}.jsonl"
    setting = student if student in configs.EMBEDDED_STUDENTS else configs.EMBEDDED
    return embedded.stands_for(kind, Path(old), setting) and not Path(old).name.startswith("golden-")


def _is_commit(field: str, new: Any, old: Any) -> bool:
    """Is ``new`` a branch or tag whose commit ``old`` is, or a commit of what a run of an earlier version had as a
    whole?"""
    ours, theirs = (hub.parts(str(path)) for path in (new, old))
    if not (ours and theirs and ours[0] == theirs[0] and ours[1]):
        return False
    return theirs[1] is None or (not hub.is_pinned(new) and hub.pin(f"{field}={new}", new)[0] == old)


def _yaml(value: Any) -> str:
    """A value as an override takes it."""
    return value if isinstance(value, str) else json.dumps(value)
