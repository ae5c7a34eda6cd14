"""Run directories as the report reads them: whatever a run has left behind, finished or not.

Reads files only; it knows neither Ray nor the present configuration classes, so that runs of older and
newer versions can stand side by side. A missing file is a fact about the run, not an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_ray.errors import InputError

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    arm: str
    """Label of the arm it belongs to: the run's name, or its method."""
    seed: int | None
    config: dict[str, Any]
    """config.yaml, flattened to dotted names; empty where there is none."""
    summary: dict[str, Any] | None
    """summary.json; None while the run is unfinished, or if it was cut off."""
    metrics: dict[str, dict[int, float]] = field(repr=False)
    """Metric name to step to value, steps in order; the last line of a repeated step wins."""
    damaged_lines: int = 0
    """Lines of metrics.jsonl that could not be read: a crash cuts one off, and a resumed run writes on behind it."""

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def steps(self) -> int:
        """The last step that was measured."""
        return max((max(values) for values in self.metrics.values() if values), default=0)

    @property
    def planned_steps(self) -> int | None:
        return self.config.get("learner.steps")

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the guard did, in order; only a finished run tells."""
        return list((self.summary or {}).get("guard_events") or [])

    def evaluation(self, when: str) -> dict[str, float]:
        """The evaluation "before" or "after" training; empty if there was none."""
        if self.summary and self.summary.get(f"eval_{when}"):
            return self.summary[f"eval_{when}"]
        if when == "after":
            return {}
        first = {name: values[0] for name, values in self.metrics.items() if 0 in values}
        return {name.removeprefix("evaluation/"): value for name, value in first.items() if "evaluation/" in name}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and below ``paths``, each once, in a stable order.

    A run directory is one that holds metrics.jsonl. Raises InputError for a path that is none and holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise InputError(f"{path}: {what}; give the directory of a run, or one that contains runs")
        runs = [path] if (path / METRICS_FILE).is_file() else _below(path)
        if not runs:
            raise InputError(f"{path}: no {METRICS_FILE} in it or below it, so nothing to report; is this a run?")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def _below(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.rglob(METRICS_FILE))


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


def read_run(path: Path) -> Run:
    """Reads one run directory. Raises InputError if it has no metrics, or a file that cannot be read."""
    metrics, damaged = _read_metrics(path / METRICS_FILE)
    if not any(metrics.values()):
        raise InputError(f"{path / METRICS_FILE}: holds no measurements yet; wait for the first step")
    config = _read_config(path / "config.yaml")
    summary = _read_summary(path / "summary.json")
    seed = (summary or {}).get("seed", config.get("seed"))
    return Run(path, _arm(path, config, summary or {}), seed, config, summary, metrics, damaged)


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


def _read_metrics(path: Path) -> tuple[dict[str, dict[int, float]], int]:
    """Values by metric and step, and the number of damaged lines; the last line may still be in writing.

    A run that was rolled back or resumed repeats steps, and evaluations stand on lines of their own.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    by_step: dict[int, dict[str, float]] = {}
    damaged = 0
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            damaged += number < len(lines)
            continue
        numbers = {name: float(value) for name, value in values.items() if name != "step" and _is_number(value)}
        by_step.setdefault(step, {}).update(numbers)
    metrics: dict[str, dict[int, float]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            metrics.setdefault(name, {})[step] = value
    return metrics, damaged


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from None
    return _flatten(tree) if isinstance(tree, dict) else {}


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    return summary if isinstance(summary, dict) else None
