"""``opd-ray replay``: a logged step again, as it was and under another loss or guard."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError, refusing
from opd_ray.models import hub
from opd_ray.models.checkpoints import inspect_run, locate_models
from opd_ray.replay.logged import coefficients, logged_steps, metrics_of, rollouts_of
from opd_ray.run import preflight, translations
from opd_ray.snapshots import Shelf, Storage, read_arrays
from opd_ray.snapshots.calls import FileCalls

if TYPE_CHECKING:
    from opd_ray.messages import Entry
    from opd_ray.replay.step import Replayed
    from opd_ray.score.translation import Translation

_CONFIG = "config.yaml"
_MAY_CHANGE = ("loss.", "guard.")
_BY_ROUNDING = 1e-5
"""Of a loss in float32: scorers put rollouts into other batches than they did then."""


@dataclass(frozen=True)
class Replay:
    """A step, as the run had it and as it would have been."""

    run_dir: Path
    tokenizer_path: str
    step: int
    overrides: tuple[str, ...]
    entries: Sequence[Entry]
    logged: dict[str, float]
    """The metrics of the step, as the run wrote them."""
    again: Replayed
    """Under the configuration of the run."""
    instead: Replayed | None
    """Under that with the overrides; None where there are none."""

    @property
    def remark(self) -> str:
        """How far the loss is from what was logged; empty where that is rounding."""
        logged, again = self.logged.get("learner/loss"), self.again.metrics["loss"]
        if logged is None:
            return "the run logged no loss for this step: it was not finite"
        if abs(logged - again) <= _BY_ROUNDING * max(1.0, abs(logged)):
            return ""
        return (
            f"the loss as configured is {again:.6g}, logged was {logged:.6g}: bfloat16 or another engine scored then, "
            "or a model is not what it was"
        )


def replay(run_dir: Path, arguments: Sequence[str], rollout_id: str | None = None) -> Replay:
    """``arguments``: step=N, and overrides of loss.* and guard.*; ``rollout_id``: one that the step must have.

    Raises InputError where there is no such run, and for a step that cannot be replayed, with those that can.
    """
    step, overrides = _split(arguments)
    if not (run_dir / _CONFIG).is_file():
        raise InputError(f"{run_dir}: is no run directory (it has no {_CONFIG}); give the --run-dir of a run")
    asked, changed = (configs.load(run_dir / _CONFIG, each) for each in ((), overrides))
    for config in (asked, changed):
        _check_scorers(config)
    storage = Storage(asked.checkpoint.location(run_dir.absolute()))
    shelf = Shelf(storage, FileCalls(local=True, deadline_s=asked.deadlines.train_s))
    metrics = metrics_of(run_dir)
    with refusing("replay"):
        start = _start(run_dir, asked, shelf, metrics, step)
    entries = rollouts_of(run_dir, step)
    there = sorted(entry.meta.rollout_id for entry in entries)
    if rollout_id not in (None, *there):
        raise InputError(f"replay: --rollout {rollout_id}: is none of the step's, as {', '.join(there[:4])}")
    _check_ids(asked, changed)
    mine, theirs = (_pinned(config) for config in (asked, changed))
    asked_of = [_asked_of(config) for config in (mine, theirs)]

    from opd_ray.replay.step import Scorers, Step  # torch, behind every refusal that needs none
    from opd_ray.replay.student import Student

    student, scorers = Student(mine), Scorers(asked_of[1][1] | asked_of[0][1])
    if start:
        checkpoint = shelf.at(start)
        files = [checkpoint.files[part] for part in checkpoint.snapshot.learner_parts]
        parts = [read_arrays(storage, file, "replay another step") for file in files]
        student.restore(checkpoint.snapshot.learner_facts, parts, checkpoint.where)
    then = Step(mine, student, scorers, asked_of[0][0])
    for before in range(start + 1, step):
        work = before, rollouts_of(run_dir, before), coefficients(mine, mine, metrics, before)
        student.take(functools.partial(then.backward, *work))
    again = then.measure(step, entries, coefficients(mine, mine, metrics, step))
    instead = None
    if overrides:
        other = Step(theirs, student, scorers, asked_of[1][0])
        instead = other.measure(step, entries, coefficients(theirs, mine, metrics, step))
    return Replay(run_dir, mine.student.path, step, overrides, entries, metrics[step], again, instead)


def _split(arguments: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """The step, and what is changed."""
    steps = [each.partition("=")[2] for each in arguments if each.partition("=")[0] == "step"]
    if len(steps) != 1 or not steps[0].isdecimal() or int(steps[0]) < 1:
        got = f"step={steps[-1]}" if steps else "none"
        raise InputError(f"replay: which step? expected one step=N of 1 or more, got {got}")
    overrides = tuple(each for each in arguments if each.partition("=")[0] != "step")
    for each in overrides:
        if not each.startswith(_MAY_CHANGE):
            raise InputError(f"replay: {each}: a step is replayed under another loss.* or guard.*, nothing else")
    return int(steps[0]), overrides


def _check_scorers(config: Config) -> None:
    for role, scorer in config.scorers.items():
        if scorer.follows_student:
            raise InputError(
                f"replay: {role}.update={scorer.update}: it scored with weights that are kept nowhere, so that no step "
                "of this run can be replayed; of runs whose scorers are fixed any can"
            )
        if scorer.url:
            raise InputError(f"replay: {role}.url: the teacher is asked here, from its checkpoint; scores are not kept")


def _start(run_dir: Path, config: Config, shelf: Shelf, metrics: dict[int, dict[str, float]], step: int) -> int:
    """From where the weights before the step are made: of a checkpoint, or 0. InputError where they cannot be."""
    logged, there = {*logged_steps(run_dir)} & metrics.keys(), {0, *shelf.complete()}
    again = config.learner.dtype == "float32"  # its optimizer's master weights are the weights

    def begin(wanted: int) -> int | None:
        below = sorted(each for each in there if each < wanted)
        for start in reversed(below):
            if start == wanted - 1 or (again and logged.issuperset(range(start + 1, wanted))):
                return start
        return None

    can = [each for each in sorted(logged) if begin(each) is not None]
    if step in can:
        return begin(step)
    reason = "its rollouts are not in the log" if step not in logged else "nothing leads to the weights before it"
    how = (
        "metrics.rollout_log_every_steps=1 makes it all" if again else "a smaller checkpoint.every_steps makes it more"
    )
    raise InputError(
        f"replay: step {step} of {run_dir}: {reason}; steps that can be replayed: "
        f"{', '.join(map(str, can)) or 'none'}. They follow the start, a checkpoint or steps that are all logged; in a "
        f"next run {how}"
    )


def _pinned(asked: Config) -> Config:
    config = resolve(asked)
    preflight.check_peft(config)
    with refusing("replay"):
        return hub.pinned(config, locate_models(config))


def _asked_of(config: Config) -> tuple[tuple[int, ...], dict[str, Translation]]:
    """The EOS set, and how teachers with another tokenizer are asked."""
    models = inspect_run(config)
    stops = preflight.stop_token_ids(config, models)
    foreign = translations.check(config, models)
    return stops, {role: translations.translation(config, role, models[role], stops) for role in foreign}


def _check_ids(asked: Config, changed: Config) -> None:
    """The student's own top-k is what it was when it sampled."""
    kept, wanted = asked.student_top_k, changed.student_top_k
    if wanted not in (0, kept):
        has = f"its top {kept}: take loss.student.top_k={kept}" if kept else "no top-k of the student's: take"
        raise InputError(
            f"replay: loss.student.support=student_top_k, top_k={wanted}: the run kept {has}"
            f"{', or' if kept else ''} teacher_top_k or full"
        )
