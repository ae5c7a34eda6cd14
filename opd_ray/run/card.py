"""The model card of a student: README.md beside its weights, as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.disk import writing
from opd_ray.models import hub

_OUTCOMES = (
    ("accuracy_greedy", "accuracy, greedy", ".3f"),
    ("accuracy_sampled", "accuracy, sampled", ".3f"),
    ("truncation_rate", "truncated answers", ".3f"),
    ("repetition_rate", "repetitive answers", ".3f"),
    ("mean_length", "tokens per answer", ".1f"),
)
"""What people are told of an evaluation: its key, its name, its form."""


def write_card(student: Path, run_dir: Path, step: int | None = None) -> None:
    """Writes the card of the run's student into the directory ``student``: of the trained one with the outcome of the
    run, or of the one after a ``step``. Raises Unwritable."""
    config = configs.load(run_dir / "config.yaml")
    summary = run_dir / "summary.json"
    outcome = json.loads(summary.read_text()) if step is None and summary.is_file() else {}
    with writing(student / "README.md"):
        (student / "README.md").write_text(card(config, outcome, step), encoding="utf-8")


def card(config: Config, summary: Mapping[str, Any], step: int | None = None) -> str:
    """Markdown with the metadata that the Hub reads at its head; ``summary`` is that of the run, or empty."""
    from huggingface_hub import ModelCardData

    steps = step if step is not None else summary.get("stopped_at") or config.learner.steps
    begun = _repository(config.student.path)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=begun,
        tags=["opd_ray", "distillation", "on-policy-distillation", config.method],
    )
    name = config.name or config.method
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}: {Path(begun or config.student.path).name} after {steps} steps",
        f"Trained with `opd_ray` (on-policy distillation on Ray, kept stable: "
        f"[StableOPD](https://arxiv.org/abs/2604.08527)); method `{config.method}`, seed {config.seed}.",
        _table(["", ""], _origins(config)),
    ]
    if outcomes := list(before_and_after(summary)):
        parts += ["## Before and after", _table(["", "before", "after"], outcomes)]
    parts += ["## Configuration", f"What is not at its default:\n\n```yaml\n{_changed(config)}```"]
    return "\n\n".join(parts) + "\n"


def _origins(config: Config) -> Iterator[list[str]]:
    """What the student was made of."""
    yield ["student", config.student.path]
    for name, scorer in config.scorers.items():
        yield [name, config.student.path if scorer.path == configs.STUDENT else scorer.path]
    yield ["task", config.data.task]
    if config.buffer.prompts_per_step:
        yield ["prompts", str(config.data.prompts)]
    if config.buffer.uses_golden:
        yield ["golden solutions", str(config.data.golden)]
    for name, each in config.evaluation_sets.items():
        yield [f"evaluation, {name.replace('_', ' ')}", str(each.path)]


def before_and_after(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows of name, before and after: of all sets together, and of each where there are several."""
    before, after = summary.get("eval_before"), summary.get("eval_after")
    if not before or not after:
        return
    for key, name, form in _OUTCOMES:
        yield [name, *(_value(scores, key, form) for scores in (before, after))]
    yield ["problems", *(str(scores["num_problems"]) for scores in (before, after))]
    sets = after.get("sets", {})
    for name in sets if len(sets) > 1 else ():
        both = [scores["sets"].get(name, {}) for scores in (before, after)]
        yield [f"{name}, avg@{sets[name]['samples']}", *(_value(each, "accuracy_sampled", ".3f") for each in both)]


def _changed(config: Config) -> str:
    """The fields that differ from the defaults, as YAML; without what is nobody's business where a card is public:
    addresses of servers, and values of environment variables and tokens, which may be keys."""
    defaults, changed = dict(configs.leaves(configs.to_dict(Config()))), OmegaConf.create({})
    for name, value in configs.leaves(configs.to_dict(config)):
        if value != defaults.get(name) and not name.endswith((".url", "_token")) and not name.startswith("env."):
            OmegaConf.update(changed, name, value)
    return OmegaConf.to_yaml(changed)


def _value(scores: Mapping[str, Any], key: str, form: str) -> str:
    """With its standard error, where it has one."""
    if (value := scores.get(key)) is None:
        return "–"
    error = scores.get(f"{key}_se")
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _table(head: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _repository(path: str) -> str | None:
    """Of a model of the Hub; None of any other."""
    repository, revision = hub.parts(path) or ("", None)
    return repository if (revision or "/" in repository) and not Path(path).exists() else None
