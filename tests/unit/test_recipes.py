"""The recipes of opd_ray/recipes: they load, are what their names say, and set nothing that is read and ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.data.golden import is_privileged
from opd_ray.data.rows import read_golden, read_prompts
from opd_ray.embedded import models
from opd_ray.embedded import prepare as embedded
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError
from opd_ray.models.checkpoints import inspect
from opd_ray.run import preflight
from opd_ray.tasks.chain import ChainTask, split_of

DIRECTORY = Path(__file__).parents[2] / "opd_ray" / "recipes"
RECIPES = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))
PAPER = [name for name in RECIPES if name.startswith("paper_")]
EMBEDDED = [name for name in RECIPES if name not in PAPER]
METHODS = {
    "async_opd": "opd",
    "cross_tokenizer": "opd",
    "eopd": "opd",
    "esr": "opd",
    "exopd": "opd",
    "gkd": "gkd",
    "grpo": "grpo",
    "iw_opd": "opd",
    "lightning": "opd",
    "lora": "stableopd",
    "many_faces": "opd",
    "minillm": "opd+mixture",
    "mopd": "opd",
    "opd": "opd",
    "opsa": "opsa",
    "opsd": "opd",
    "prefix_opd": "opd",
    "rethinking": "opd",
    "revisiting": "opd",
    "sdpo": "opd",
    "sequence_kd": "sequence_kd",
    "sft": "sft",
    "simple_opd": "gkd",
    "stableopd": "stableopd",
    "tgopd": "opd+evidence",
    "thinking_machines": "opd",
    "top_d": "opd",
    "tropd": "opd",
    "paper_opd_1.5b": "opd",
    "paper_sft_1.5b": "sft",
    "paper_stableopd_1.5b": "stableopd",
    "paper_stableopd_7b": "stableopd",
}
LONGEST_LINE = 120


def load(name: str) -> Config:
    return configs.load(DIRECTORY / f"{name}.yaml")


def text(name: str) -> str:
    return (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")


def head(name: str) -> list[str]:
    """The comment that a recipe begins with."""
    lines = text(name).splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def leaves(raw: Any, prefix: str = "") -> Iterator[str]:
    """Every field that a recipe sets, as section.field."""
    if not isinstance(raw, dict):
        yield prefix
        return
    for name, value in raw.items():
        yield from leaves(value, f"{prefix}.{name}" if prefix else name)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher in the student's place, and small files."""
    directory = tmp_path_factory.mktemp("embedded")
    for name, problems in embedded.problem_sets(0).items():
        embedded.write_rows(directory / f"{name}.jsonl", problems[:64], with_solutions=name == "golden")
    (directory / "student").symlink_to(TEACHER_DIR)
    pairs = models.make_model(32, 1, 0, alphabet=models.PAIRS)
    models.save(pairs, directory / "pairs", alphabet=models.PAIRS)
    return directory


@pytest.fixture
def prepared(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded models and data without building a student."""
    monkeypatch.setattr(embedded, "prepare", lambda seed, setting: few)
    others = {configs.EMBEDDED: TEACHER_DIR, configs.EMBEDDED_PAIRS: few / "pairs"}
    monkeypatch.setattr(embedded, "teacher", lambda setting, word: others[word])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    config = load(name)
    assert config.method == METHODS[name]
    assert config.name


def test_every_recipe_is_listed_here_and_in_the_readme():
    assert sorted(METHODS) == RECIPES
    readme = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"[{name}.yaml]({name}.yaml)" not in readme] == []
    linked = re.findall(r"\]\(([\w.]+)\)", readme)
    assert [name for name in linked if not (DIRECTORY / name).exists()] == []


def test_names_are_told_apart_in_reports():
    names = [load(name).name for name in RECIPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_source_loss_and_what_to_adapt(name):
    lines = head(name)
    said = "\n".join(lines)
    assert 3 <= len(lines) <= 16
    assert re.search(r"arXiv \d{4}\.\d{4,5}|Thinking Machines Lab", said) or name == "sft"
    assert any(line.startswith("#   L = ") or "  L = " in line for line in lines), "no formula of the loss"
    if name in EMBEDDED:
        assert "# Own models: " in said
    assert max(map(len, text(name).splitlines())) <= LONGEST_LINE


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_recipe_passes_preflight_on_the_embedded_models(name, prepared, monkeypatch):
    """With relative paths from the root of the checkout, where the README runs them."""
    monkeypatch.chdir(DIRECTORY.parents[1])
    config = resolve(load(name))
    facts = preflight.check_files(config)
    assert facts.num_prompts > 0
    assert facts.golden or not (config.buffer.uses_golden or is_privileged(config))


def test_stableopd_is_the_default():
    assert dataclasses.replace(load("stableopd"), name=None) == configs.load()


def test_only_the_default_is_changed_by_the_guard():
    """A recipe with a guard that acts would be another method."""
    acting = [name for name in EMBEDDED if load(name).guard.level not in ("off", "warn")]
    assert set(acting) - {"sft", "sequence_kd"} == {"stableopd"}
    for name in ("sft", "sequence_kd"):  # the guard watches what the student samples
        assert not load(name).uses_student


# Field (or section) to the condition under which its value has an effect.
CONDITIONS: list[tuple[str, Callable[[Config], bool]]] = [
    (r"rollout\.(temperature|top_p|in_flight|responses_per_prompt)", lambda c: c.buffer.prompts_per_step > 0),
    (r"rollout\.(temperature|top_p|in_flight)", lambda c: c.uses_student),
    (r"rollout\.teacher_\w+", lambda c: c.buffer.has_teacher_write),
    (r"buffer\.teacher_filter", lambda c: c.buffer.uses_teacher_rollouts),
    (r"rollout\.horizon", lambda c: c.may_shorten),
    (r"buffer\.golden_pairing", lambda c: c.buffer.uses_golden),
    (r"buffer\.golden_per_prompt", lambda c: c.buffer.prompts_per_step > 0),
    (r"buffer\.max_staleness", lambda c: c.buffer.prompts_per_step > 0),
    (r"data\.golden(_\w+)?", lambda c: c.loads_golden or is_privileged(c)),
    (r"teacher\..*", lambda c: c.uses_teacher or c.buffer.has_teacher_write),
    (r"more_teachers\..*", lambda c: c.uses_teacher),
    (r"(teacher|more_teachers\.\w+)\.weight", lambda c: c.loss.teachers == "weighted" and len(c.teachers) > 1),
    (r"teacher\.update_decay", lambda c: c.teacher.update == "average"),
    (r"teacher\.update_every_steps", lambda c: c.teacher.update == "periodic"),
    (r"reference\..*", lambda c: c.uses_reference),
    (r"loss\.teachers", lambda c: len(c.teachers) > 1),
    (r"loss\.reference\.(?!coef).*", lambda c: c.loss.reference.used),
    (r"loss\.reference\.(top_k|tail)", lambda c: c.loss.reference.estimator == "top_k"),
    (r"loss\.advantage\..*", lambda c: c.loss.student.used and c.loss.student.divergence == "k1"),
    (r"loss\.advantage\.reward_std", lambda c: c.loss.advantage.reward_coef > 0),
    (r"loss\.advantage\.(policy|clip|discount)", lambda c: c.needs_teacher("student")),
    (r"loss\.importance\..*", lambda c: c.loss.student.used),
    (r"loss\.importance\.clip_ratio", lambda c: c.loss.importance.correction == "clip"),
    (r"loss\.importance\.cap", lambda c: c.loss.importance.correction == "truncate"),
    (r"loss\.importance\.mask_\w+", lambda c: c.loss.importance.correction == "mask"),
    (r"guard\.(?!level).*", lambda c: c.guard.level != "off"),
    (r"guard\.\w+", lambda c: c.uses_student),
    (r"learner\.warmup_steps", lambda c: c.learner.warmup_steps > 0),
    (r"evaluation\.num_problems_during", lambda c: c.evaluation.every_steps > 0),
]


def term_conditions(source: str) -> list[tuple[str, Callable[[Config], bool]]]:
    """The same for the loss of a source."""

    def term(config: Config) -> Any:
        return config.loss.terms[source]

    def on_top_k(config: Config) -> bool:
        return term(config).on_distributions and term(config).support != "full"

    return [
        (rf"loss\.{source}\.(?!coef).*", lambda c: term(c).used),
        (rf"loss\.{source}\.support", lambda c: term(c).on_distributions),
        (rf"loss\.{source}\.(top_k|tail)", on_top_k),
        (rf"loss\.{source}\.beta", lambda c: term(c).divergence == "jsd"),
        (rf"loss\.{source}\.entropy_gate_coef", lambda c: term(c).entropy_gate is not None),
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_sets_what_cannot_matter(name):
    config = load(name)
    conditions = [*CONDITIONS, *(each for source in config.loss.terms for each in term_conditions(source))]
    idle = [
        field
        for field in leaves(yaml.safe_load(text(name)))
        for pattern, matters in conditions
        if re.fullmatch(pattern, field) and not matters(config)
    ]
    assert idle == []


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_top_k_that_a_recipe_sets_is_smaller_than_the_embedded_vocabulary(name):
    """k ≥ V would make every support and tail the same."""
    vocabulary = inspect("teacher.path", str(TEACHER_DIR)).vocab_size
    config = load(name)
    for source, term in config.loss.terms.items():
        if "top_k" in (yaml.safe_load(text(name))["loss"].get(source) or {}):
            assert term.top_k < vocabulary


@pytest.mark.parametrize("name", PAPER)
def test_every_value_of_a_paper_file_says_where_it_is_from(name):
    lines = [line for line in text(name).splitlines() if line.strip() and not line.startswith("#")]
    values = [line for line in lines if not line.split("#")[0].rstrip().endswith(":")]
    marked = re.compile(r"  # (paper|unstated: ours|place it|machine)\b")
    assert [line for line in values if not marked.search(line)] == []
    assert sum("# unstated: ours" in line for line in values) >= 10


@pytest.mark.parametrize("name", ["paper_stableopd_1.5b", "paper_stableopd_7b"])
def test_the_paper_files_carry_what_the_paper_states(name):
    config = load(name)
    assert (config.buffer.prompts_per_step, config.rollout.responses_per_prompt) == (64, 4)
    assert (config.buffer.golden_per_prompt, config.buffer.golden_pairing) == (1, "prompt")
    assert (config.learner.lr, config.rollout.temperature, config.evaluation.temperature) == (1e-6, 1.0, 0.6)
    assert (config.metrics.repetition_window_chars, config.metrics.repetition_ratio) == (10_000, 10)
    student, golden = config.loss.student, config.loss.golden
    assert (student.coef, student.divergence, golden.divergence) == (1, "k1", "cross_entropy")
    assert config.loss.importance.correction == "clip"
    assert config.loss.reduction == "sequence"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_paper_files_evaluate_on_its_six_sets(name):
    sets = load(name).evaluation_sets
    assert {set_name: each.samples for set_name, each in sets.items()} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
        "math500": 1,
        "minerva": 1,
        "olympiadbench": 1,
    }
    assert {(each.temperature, each.greedy, each.num_problems) for each in sets.values()} == {(0.6, False, None)}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_files_ask_for_four_gpus(name):
    config = load(name)
    resources = {"CPU": 64.0, "GPU": 4.0}
    preflight.check_resources(config, lambda _: resources)
    with pytest.raises(InputError, match="GPUs asked"):
        preflight.check_resources(config, lambda _: {**resources, "GPU": 3.0})


def test_routed_prompts_name_teachers_that_the_recipe_has():
    rows = read_prompts(str(DIRECTORY / "mopd_prompts.jsonl"))
    counts = {name: sum(row["teacher"] == name for row in rows) for name in load("mopd").teachers}
    assert sum(counts.values()) == len(rows)
    assert min(counts.values()) > 100


@pytest.mark.parametrize("file", ["mopd_prompts.jsonl", "solved_prompts.jsonl"])
def test_shipped_problems_are_training_problems(file):
    rows = read_prompts(str(DIRECTORY / file))
    assert {split_of(row["prompt"]) for row in rows} == {"train"}


def test_shipped_solutions_are_right():
    rows = read_golden(str(DIRECTORY / "solved_prompts.jsonl"))
    assert all(ChainTask().verify(row["response"], row) for row in rows)
