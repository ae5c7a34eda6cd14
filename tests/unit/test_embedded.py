"""The embedded models and data: ordinary files, cached whole or not at all, and a teacher that passes its probes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_ray.data.rendering import Renderer
from opd_ray.disk import cache_root
from opd_ray.embedded import models as embedded_models
from opd_ray.embedded import prepare as embedded
from opd_ray.embedded.models import EOS_ID, IGNORED, PAD_ID, VOCABULARY, copy_probe, measure
from opd_ray.errors import InputError
from opd_ray.tasks import chain

CHARACTERS = "0123456789+-*^=;#?"
PROBLEMS = chain.draw_distinct(random.Random("unit tests"), "validation", 200)


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(embedded.TEACHER_DIR, dtype=torch.float32)


@pytest.fixture
def quick_student(monkeypatch):
    """Replaces the training by fresh weights and counts how often it was asked for."""
    built = []

    def build_student(seed, report):
        built.append(seed)
        report("training the student", 100, 100)
        return embedded_models.make_model(32, 1, seed)

    monkeypatch.setattr(embedded_models, "build_student", build_student)
    return built


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_to(prompt: str) -> str:
    """Of ^5-0-6+6=, from left to right and modulo 7."""
    value = int(prompt[1])
    for step in re.findall(r"[-+*]\d", prompt):
        value = eval(f"{value}{step}") % 7  # noqa: S307 - a digit, an operator and a digit
    return str(value)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path))


# --- tokenizer ---


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.TEACHER_DIR)


def test_shipped_tokenizer_is_the_one_in_the_code(tokenizer):
    assert tokenizer.get_vocab() == VOCABULARY == embedded_models.make_tokenizer().get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)


@pytest.mark.slow
@settings(deadline=None)  # a busy machine must not fail a test that measures nothing
@given(text=st.text(alphabet=CHARACTERS))
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [VOCABULARY[character] for character in text]
    assert tokenizer.decode([*ids, EOS_ID, PAD_ID], skip_special_tokens=True) == text


def test_a_prompt_is_read_as_it_stands():
    ids = Renderer(chain.ChainTask(), str(embedded.TEACHER_DIR)).prompt({"prompt": "^5-0-6+6="})
    assert ids == [VOCABULARY[character] for character in "^5-0-6+6="]


# --- batches ---


def test_batch_scores_the_response_and_its_eos_but_no_prompt_and_no_padding():
    short, long = chain.Problem(1, (("+", 2), ("+", 3))), chain.Problem(5, (("-", 0), ("-", 6), ("+", 6)))
    tokens, labels = embedded_models.to_batch([(problem, chain.clean_text(problem)) for problem in (short, long)])
    assert tokens.shape == labels.shape == (2, len("^5-0-6+6=5-0=5;5-6=6;6+6=5#5"))
    scored = labels[0][labels[0] != IGNORED].tolist()
    assert scored == [*(VOCABULARY[c] for c in "1+2=3;3+3=6#6"), EOS_ID]
    prompt_labels = labels[1, : len("^5-0-6+6=") - 1]
    assert (prompt_labels == IGNORED).all()
    assert labels[1, -1] == EOS_ID


def test_batch_cuts_a_looping_text_without_eos():
    problem = chain.Problem(1, (("+", 2), ("+", 3)))
    _, labels = embedded_models.to_batch([(problem, chain.looping_text(problem, random.Random(0)))])
    assert EOS_ID not in labels


# --- training ---


@pytest.mark.slow
def test_training_is_the_same_for_the_same_seed():
    phase = embedded_models.Phase(3, (0.4, 0.3, 0.3), (0.01, 0.0))

    def train() -> torch.Tensor:
        trainer = embedded_models.Trainer(embedded_models.make_model(32, 1, seed=5), random.Random(5))
        assert len(list(trainer.run(phase))) == 3
        return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])

    first = train()
    torch.rand(7)  # a caller's random stream must not matter
    assert torch.equal(first, train())


def test_student_ends_its_clean_phase_at_the_target(monkeypatch):
    monkeypatch.setattr(embedded_models, "solution_probability", lambda model, problems: 1.0)
    monkeypatch.setattr(embedded_models, "STUDENT_MIXED", embedded_models.Phase(2, (0.7, 0.3, 0.0), (0.003, 0.0)))
    reports = []
    embedded_models.build_student(3, lambda *report: reports.append(report))
    assert reports == [("training the student", 90, 100), ("training the student", 100, 100)]


@pytest.mark.slow
def test_sampled_answers_agree_with_their_exact_probability(teacher):
    # The student stops on the exact number, people read the sampled one; other ways lead to the answer, too.
    exact = embedded_models.solution_probability(teacher, PROBLEMS)
    assert 0 < exact < 1
    assert measure(teacher, PROBLEMS, 1.0)[0] > exact - 0.08


# --- the cache ---


@pytest.mark.slow
def test_prepare_writes_checkpoints_and_rows_that_load(tmp_path, quick_student):
    built = embedded.prepare(11)
    model = AutoModelForCausalLM.from_pretrained(built / "student")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == EOS_ID
    assert model.config.pad_token_id == model.generation_config.pad_token_id == PAD_ID
    assert AutoTokenizer.from_pretrained(built / "student").eos_token_id == EOS_ID
    data = {name: read(built / f"{name}.jsonl") for name in ("prompts", "golden", "test")}
    assert {name: len(rows) for name, rows in data.items()} == {"prompts": 8192, "golden": 128, "test": 1024}
    for name, rows in data.items():
        assert len({row["id"] for row in rows}) == len(rows)
        assert {chain.split_of(row["prompt"]) for row in rows} == {"test" if name == "test" else "train"}
        assert all(row["answer"] == answer_to(row["prompt"]) for row in rows)


def test_golden_rows_are_right_and_fit_the_budget(tmp_path, quick_student):
    task = chain.ChainTask()
    for row in read(embedded.prepare(12) / "golden.jsonl"):
        assert task.verify(row["response"], row)
        assert "?" not in row["response"]
        assert len(row["response"]) < chain.MAX_NEW_TOKENS


def test_second_call_finds_the_first_ones_files(tmp_path, quick_student):
    first = embedded.prepare(11)
    assert embedded.prepare(11) == first
    assert quick_student == [11]
    assert embedded.prepare(12) != first
    assert quick_student == [11, 12]


def test_seeds_share_the_held_out_problems_and_nothing_else(tmp_path, quick_student):
    one, two = embedded.prepare(1), embedded.prepare(2)
    same = {
        name: (one / name).read_bytes() == (two / name).read_bytes()
        for name in ("prompts.jsonl", "golden.jsonl", "test.jsonl")
    }
    assert same == {"prompts.jsonl": False, "golden.jsonl": False, "test.jsonl": True}


@pytest.mark.slow
def test_interrupted_build_leaves_nothing_behind(tmp_path, quick_student, monkeypatch):
    def interrupted(seed, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded_models, "build_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded.prepare(11)
    assert list(tmp_path.iterdir()) == []
    assert (embedded.prepare(11) / "student").is_dir()


def test_of_two_builders_at_once_the_first_one_stays(tmp_path, quick_student, monkeypatch):
    build = embedded_models.build_student

    def overtaken(seed, report):
        monkeypatch.setattr(embedded_models, "build_student", build)
        (embedded.prepare(seed) / "mark").touch()
        return build(seed, report)

    monkeypatch.setattr(embedded_models, "build_student", overtaken)
    built = embedded.prepare(11)
    assert (built / "mark").exists()
    assert list(tmp_path.iterdir()) == [built]


def test_key_covers_seed_and_package_versions(monkeypatch):
    before = embedded.cache_key(1)
    assert embedded.cache_key(1) == before != embedded.cache_key(2)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0")
    assert embedded.cache_key(1) != before


def test_cache_that_cannot_be_written_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="OPD_RAY_CACHE"):
        embedded.prepare(0)


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    assert cache_root() == tmp_path
    monkeypatch.delenv("OPD_RAY_CACHE")
    assert cache_root() == Path.home() / ".cache" / "opd_ray"


def test_progress_is_plain_lines_without_a_terminal(tmp_path, quick_student, capsys):
    embedded.prepare(11)
    assert capsys.readouterr().err == "training the student: 100 %\n"


# --- the shipped teacher ---


def test_shipped_teacher_is_small():
    assert sum(file.stat().st_size for file in embedded.TEACHER_DIR.iterdir()) < 1_000_000


def test_shipped_teacher_solves_the_task(teacher):
    accuracy, truncated = measure(teacher, PROBLEMS, 0.0)
    assert accuracy >= 0.97
    assert truncated <= 0.02


def test_shipped_teacher_sees_errors_and_copies_what_repeats(teacher):
    copied_at_first, seen = copy_probe(teacher, PROBLEMS[:64], num_tries=0, right=False)
    copied_after_five, _ = copy_probe(teacher, PROBLEMS[:64], num_tries=5, right=False)
    assert seen > 0.7
    assert copied_at_first < 0.03
    assert copied_after_five > 5 * copied_at_first
    _, doubt = copy_probe(teacher, PROBLEMS[:64], num_tries=0, right=True)
    _, doubt_after_five = copy_probe(teacher, PROBLEMS[:64], num_tries=5, right=True)
    assert doubt < 0.12
    assert doubt_after_five > 0.4
