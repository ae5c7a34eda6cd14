"""Run directories as the report reads them: whatever a run has left behind, finished or not.

Reads files only; it knows neither Ray nor the present configuration classes, so that runs of older and
newer versions can stand side by side. A missing file is a fact about the run, not an error.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_ray.config.keys import without_keys
from opd_ray.errors import InputError
from opd_ray.report.measurements import EVALUATION, Metrics, is_number, read_metrics

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Attempt:
    """A way that a run went before it went back to an earlier step and on from there."""

    metrics: Metrics = field(repr=False)
    """All that had been measured on the way, from the first step on."""
    first: int
    """First of the steps that were abandoned."""
    last: int
    rolled_back: bool = False
    """By the guard, as its events say; otherwise the run was cut off and resumed."""


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    arm: str
    """Label of the arm it belongs to: the run's name, or its method."""
    seed: int | None
    config: dict[str, Any]
    """config.yaml, flattened to dotted names; empty where there is none."""
    summary: dict[str, Any]
    """summary.json; empty while the run is unfinished, or if it was cut off."""
    metrics: Metrics = field(repr=False)
    """Of the steps that led to where the run is now; a step that was repeated has its last values."""
    damaged_lines: int = 0
    """Lines of metrics.jsonl that could not be read: a crash cuts one off, and a resumed run writes on behind it."""
    abandoned: tuple[Attempt, ...] = ()
    """In the order of time."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Command, commit, versions and hardware of the last start, as far as they are known."""

    @property
    def name(self) -> str:
        """Beside its arm's other runs."""
        return self.path.name if self.seed is None else f"seed {self.seed}"

    @property
    def attempts(self) -> list[Metrics]:
        """All ways that the run went, in the order of time; the last one is the one that counts."""
        return [*(attempt.metrics for attempt in self.abandoned), self.metrics]

    @property
    def finished(self) -> bool:
        return bool(self.summary) and self.summary.get("stopped_by") != "signal"

    @property
    def steps(self) -> int:
        """The last step that was measured."""
        return max((max(values) for values in self.metrics.values() if values), default=0)

    @property
    def planned_steps(self) -> int | None:
        return self.config.get("learner.steps")

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the guard said and did, in order, the first and the last of it; only a run that has ended tells."""
        return list(self.summary.get("guard_events") or [])

    @property
    def golden_used(self) -> int:
        """Golden rollouts that were used of those in the file; 0 where there was no golden set."""
        return int((self.summary.get("golden") or {}).get("used") or 0)

    def evaluation(self, when: str) -> dict[str, float]:
        """The evaluation "before" or "after" training; empty if there was none."""
        if measured := self.summary.get(f"eval_{when}"):
            return measured
        if when == "after":
            return {}
        first = {name: values[0] for name, values in self.metrics.items() if 0 in values}
        return {name.removeprefix(EVALUATION): value for name, value in first.items() if name.startswith(EVALUATION)}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and below ``paths``, each once, in a stable order.

    A run directory is one that holds metrics.jsonl. Raises InputError for a path that is none and holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise InputError(f"{path}: {what}; give the directory of a run, or one that contains runs")
        single = (path / METRICS_FILE).is_file()
        runs = [path] if single else sorted(file.parent for file in path.rglob(METRICS_FILE))
        if not runs:
            raise InputError(f"{path}: no {METRICS_FILE} in it or below it, so nothing to report; is this a run?")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs among and below ``paths``, and a sentence for each that cannot be read beside others that can.

    Raises InputError where not one can be read.
    """
    runs, errors = [], []
    for path in find_runs(paths):
        try:
            runs.append(read_run(path))
        except InputError as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    return runs, [f"Left out: {error}." for error in errors]


def study_order(paths: Sequence[Path]) -> tuple[str, ...]:
    """The arms as results.json of a study lists them, in the directories that have one."""
    arms: list[str] = []
    for path in paths:
        try:
            found = json.loads((path / "results.json").read_text(encoding="utf-8"))
            arms += [str(row["arm"]) for row in found["arms"]]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a study's, so it orders nothing
    return tuple(arms)


def read_run(path: Path) -> Run:
    """Reads one run directory. Raises InputError if it has no metrics, or a file that cannot be read."""
    metrics, ways, damaged = read_metrics(path / METRICS_FILE)
    if not metrics and not ways:
        raise InputError(f"{path / METRICS_FILE}: holds no measurements yet; wait for the first step")
    config = _flatten(_read(path / "config.yaml", yaml.safe_load))
    # One of a former version may hold keys, which are refused now.
    config = {name: without_keys(value) if isinstance(value, str) else value for name, value in config.items()}
    summary = _read(path / "summary.json", json.loads)
    _add_first_evaluation(metrics, summary)
    # The guard ends an attempt at the last step that was measured.
    rollbacks = {event.get("step") for event in summary.get("guard_events") or [] if event.get("level") == "rollback"}
    abandoned = tuple(Attempt(*way, rolled_back=way[2] in rollbacks) for way in ways)
    seed = summary.get("seed", config.get("seed"))
    origin = _origin(path, summary)
    return Run(path, _arm(path, config, summary), seed, config, summary, metrics, damaged, abandoned, origin)


def _origin(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """An unfinished run has said it when it began."""
    said = summary if "command" in summary else {}
    if not said:
        with contextlib.suppress(OSError), (path / "events.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    if '"start"' in line and (event := json.loads(line)).get("kind") == "start":
                        said = event
    known = summary | said
    return {name: known[name] for name in ("command", "commit", "versions", "hardware") if name in known}


def _arm(path: Path, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """An unfinished run has no summary to say its method, so the configuration is asked, if it still loads."""
    if label := summary.get("name") or config.get("name") or summary.get("method"):
        return str(label)
    if config:
        from opd_ray import config as configs

        try:
            return str(configs.load(path / "config.yaml").method)
        except (InputError, AttributeError):
            pass  # written by another version
    return path.name


def _add_first_evaluation(metrics: Metrics, summary: dict[str, Any]) -> None:
    """Arms of a study share the evaluation of a seed's student: it is in every summary, measured in one arm only."""
    before = summary.get("eval_before")
    if not isinstance(before, dict) or any(0 in metrics.get(EVALUATION + name, {}) for name in before):
        return
    found = {**before, **(before.get("teacher") or {})}
    for name, scores in (before.get("sets") or {}).items():
        passed = {f"pass_at_{k}": value for k, value in (scores.get("pass_at") or {}).items()}
        of_set = {f"{name}/{key}": value for key, value in {**scores, **passed}.items()}
        found |= {key: value for key, value in of_set.items() if EVALUATION + key in metrics}  # what has a curve
    for name, value in found.items():
        if is_number(value):
            metrics[EVALUATION + name] = {0: float(value), **metrics.get(EVALUATION + name, {})}


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file; empty where there is none. Raises InputError for one that cannot be read."""
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = {".yaml": "YAML", ".json": "JSON"}[path.suffix]
        raise InputError(f"{path}: cannot be read as {kind} ({error})") from None
    return content if isinstance(content, dict) else {}


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
