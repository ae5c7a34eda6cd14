"""The embedded models and data: ordinary files, cached whole or not at all, and a teacher that passes its probes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
from pathlib import Path

import build_embedded
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_ray import config as configs
from opd_ray.config import from_dict
from opd_ray.data.rendering import Renderer
from opd_ray.disk import cache_root
from opd_ray.embedded import misled
from opd_ray.embedded import models as embedded_models
from opd_ray.embedded import prepare as embedded
from opd_ray.embedded.models import EOS_ID, IGNORED, PAD_ID, VOCABULARY, copy_probe, measure
from opd_ray.embedded.resolve import resolve, without_foreign_golden
from opd_ray.errors import InputError
from opd_ray.run import preflight, resuming
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

    def build_student(seed, report, chains):
        built.append(seed)
        report("training the student", 100, 100)
        return embedded_models.make_model(32, 1, seed, chains)

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


PAIRS = embedded_models.PAIRS


@pytest.mark.slow
@given(text=st.text(alphabet=CHARACTERS))
def test_the_tokenizer_of_pairs_merges_as_its_alphabet_says(text):
    tokenizer = embedded_models.make_tokenizer(alphabet=PAIRS)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == PAIRS.ids(text)
    assert tokenizer.convert_ids_to_tokens(ids) == PAIRS.tokens(text) and "".join(PAIRS.tokens(text)) == text
    assert tokenizer.decode([*ids, EOS_ID, PAD_ID], skip_special_tokens=True) == text


def test_pairs_are_a_sign_and_a_digit():
    assert PAIRS.tokens("^5-0-6+6=") == ["^", "5", "-0", "-6", "+6", "="]
    assert PAIRS.tokens("5-0=5;5-6=2?5-6=6#6") == ["5", *["-0", "=5", ";5", "-6", "=2", "?5", "-6", "=6", "#6"]]
    assert {*VOCABULARY.items()} < {*PAIRS.vocabulary.items()}


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


def test_a_pair_is_scored_where_both_of_its_characters_are_and_no_token_is_of_prompt_and_response():
    problem = chain.Problem(1, (("+", 2), ("+", 3)))
    text = chain.Text("1+2=4?1+2=3", (True,) * 4 + (False,) + (True,) * 6, finished=False)
    tokens, labels = embedded_models.to_batch([(problem, text)], PAIRS)
    named = {index: token for token, index in PAIRS.vocabulary.items()}
    assert [named[token] for token in tokens[0].tolist()] == [*["^", "1", "+2", "+3", "=", "1", "+2", "=4", "?1", "+2"]]
    assert [named[label] for label in labels[0].tolist() if label != IGNORED] == [*["1", "+2", "?1", "+2", "=3"]]


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
    quick = embedded_models.Student(32, 1, 0.35, mixed=embedded_models.Phase(2, (0.7, 0.3, 0.0), (0.003, 0.0)))
    monkeypatch.setitem(embedded_models.STUDENTS, chain.SHORT, quick)
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
        assert len(row["response"]) < chain.SHORT.max_new_tokens


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
    def interrupted(seed, report, chains):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded_models, "build_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded.prepare(11)
    assert list(tmp_path.iterdir()) == []
    assert (embedded.prepare(11) / "student").is_dir()


def test_of_two_builders_at_once_the_first_one_stays(tmp_path, quick_student, monkeypatch):
    build = embedded_models.build_student

    def overtaken(seed, report, chains):
        monkeypatch.setattr(embedded_models, "build_student", build)
        (embedded.prepare(seed) / "mark").touch()
        return build(seed, report, chains)

    monkeypatch.setattr(embedded_models, "build_student", overtaken)
    built = embedded.prepare(11)
    assert (built / "mark").exists()
    assert list(tmp_path.iterdir()) == [built]


def test_key_covers_seed_and_package_versions(monkeypatch):
    before = embedded.cache_key("seed 1")
    assert embedded.cache_key("seed 1") == before != embedded.cache_key("seed 2")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0")
    assert embedded.cache_key("seed 1") != before


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


# --- the harder setting, and a teacher with another end ---


@pytest.fixture
def quick_lesson(monkeypatch):
    """The shipped teacher is taught nothing but the longer context."""
    monkeypatch.setattr(embedded_models, "LONGER_TEACHER", embedded_models.Phase(0, (1.0, 0.0, 0.0), (0.0, 0.0)))


def test_the_harder_setting_has_longer_problems_a_longer_context_and_a_directory_of_its_own(quick_student):
    easy, hard = embedded.prepare(11), embedded.prepare(11, "embedded-hard")
    assert hard != easy
    assert quick_student == [11, 11]
    task = chain.ChainTask()
    for name in ("prompts", "golden", "test"):
        rows = read(hard / f"{name}.jsonl")
        assert {len(re.findall(r"[-+*]", row["prompt"])) for row in rows} == {3, 4, 5}
        assert {chain.split_of(row["prompt"]) for row in rows} == {"test" if name == "test" else "train"}
        assert all(row["answer"] == answer_to(row["prompt"]) for row in rows)
        assert all(task.verify(row["response"], row) for row in rows if name == "golden")
    config = AutoConfig.from_pretrained(hard / "student")
    assert config.max_position_embeddings == 128 + 48


def test_golden_sets_of_a_size_are_of_the_setting(quick_student):
    rows = read(embedded.golden_file(11, "8", "embedded-hard"))
    assert len(rows) == 8
    assert rows == read(embedded.golden_file(11, "", "embedded-hard"))[:8]


def test_the_teacher_of_the_harder_setting_is_made_once(quick_lesson):
    made = embedded.teacher("embedded-hard")
    assert made == embedded.teacher("embedded-hard")
    assert embedded.teacher() == embedded.TEACHER_DIR
    assert embedded.is_embedded(str(made))


def test_a_teacher_with_another_end_thinks_the_same_and_ends_with_the_other_token(teacher):
    made = embedded.teacher(word="embedded-other-end")
    other = AutoModelForCausalLM.from_pretrained(made)
    assert other.config.eos_token_id == other.generation_config.eos_token_id == PAD_ID
    assert AutoTokenizer.from_pretrained(made).eos_token_id == PAD_ID
    tokens, _ = embedded_models.to_batch([(problem, chain.clean_text(problem)) for problem in PROBLEMS[:4]])
    exchanged = [EOS_ID, PAD_ID, *range(2, len(VOCABULARY))]
    with torch.inference_mode():
        theirs, ours = other(tokens[:, :14]).logits, teacher(tokens[:, :14]).logits
    torch.testing.assert_close(theirs[..., exchanged], ours)


@pytest.mark.parametrize(
    ("word", "setting", "path", "stands"),
    [
        ("embedded", "embedded", "chain-1f-seed0/student", True),
        ("embedded", "embedded", "chain-hard-1f-seed0/student", False),
        ("embedded-hard", "embedded-hard", "chain-hard-1f-seed0/student", True),
        ("embedded-hard", "embedded-hard", "chain-1f-seed0/student", False),
        ("embedded", "embedded-hard", "chain-hard-1f-seed0/test.jsonl", True),
        ("embedded", "embedded-hard", "chain-hard-teacher-1f", True),
        ("embedded", "embedded-hard", "chain-hard-teacher-other-end-1f", False),
        ("embedded-other-end", "embedded-hard", "chain-hard-teacher-other-end-1f", True),
        ("embedded-other-end", "embedded", "chain-hard-teacher-other-end-1f", False),
        ("embedded", "embedded", "/models/student", False),
    ],
)
def test_a_word_stands_for_what_its_setting_made(word, setting, path, stands, tmp_path):
    assert embedded.stands_for(word, tmp_path / path, setting) is stands


# --- from the words to paths ---


def test_one_word_chooses_the_harder_setting(quick_student, quick_lesson):
    config = configs.load(None, ["student.path=embedded-hard", "data.golden=embedded:8", "seed=11"])
    assert config.rollout.max_response_tokens == 128
    assert config.learner.lr == configs.load().learner.lr
    resolved, built = resolve(config), embedded.prepare(11, "embedded-hard")
    assert resolved.student.path == str(built / "student")
    assert resolved.teacher.path == str(embedded.teacher("embedded-hard"))
    assert resolved.data.prompts == str(built / "prompts.jsonl")
    assert resolved.data.golden == str(built / "golden-8.jsonl")
    assert resolved.data.evaluation == str(built / "test.jsonl")


def test_the_other_end_is_the_teachers_alone(quick_student):
    resolved = resolve(configs.load(None, ["teacher.path=embedded-other-end"]))
    assert resolved.teacher.path == str(embedded.teacher(word="embedded-other-end"))
    assert resolved.reference.path == resolved.student.path
    teacher_ends = preflight.inspect_run(resolved)["teacher"].eos_token_ids
    assert teacher_ends == (PAD_ID,)
    assert preflight.stop_token_ids(resolved, preflight.inspect_run(resolved)) == (EOS_ID, PAD_ID)
    untold = dataclasses.replace(resolved, teacher=dataclasses.replace(resolved.teacher, eos_token_ids=(EOS_ID,)))
    assert preflight.stop_token_ids(untold, preflight.inspect_run(untold)) == (EOS_ID,)


@pytest.mark.slow
def test_the_teacher_of_pairs_is_built_once_with_its_own_tokenizer(monkeypatch, quick_student):
    built = []

    def build_teacher(seed, report, alphabet):
        built.append(seed)
        return embedded_models.make_model(32, 1, seed, alphabet=alphabet)

    monkeypatch.setattr(embedded_models, "build_teacher", build_teacher)
    config = resolve(configs.load(None, ["teacher.path=embedded-pairs"]))
    path = embedded.teacher(word="embedded-pairs")
    assert config.teacher.path == str(path) and embedded.is_embedded(config.teacher.path)
    assert built == [embedded.PAIRS_SEED] and config.reference.path != config.teacher.path
    assert AutoTokenizer.from_pretrained(path).get_vocab() == PAIRS.vocabulary
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(PAIRS.vocabulary)
    mine = ["student.path=/s", "data.prompts=/p", "evaluation.num_problems=0"]
    with pytest.raises(InputError, match="teacher.path is the embedded one"):
        configs.load(None, ["teacher.path=embedded-pairs", *mine])
    with pytest.raises(InputError, match="made for the problems of student.path=embedded, not of embedded-hard"):
        embedded.teacher("embedded-hard", "embedded-pairs")


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


@pytest.mark.parametrize(
    ("options", "unread"),
    [(["--hard", "--seed", "1"], "--seed beside --hard"), (["--hard", "--output", "x"], "--output beside --hard")]
    + [(["--pairs", "--hard"], "--hard beside --pairs"), (["--pairs", "--student-seed", "1"], "--student-seed beside")],
)
def test_who_builds_models_is_told_what_would_not_be_read(options, unread):
    told = CliRunner().invoke(build_embedded.main, options)
    assert told.exit_code == 2 and unread in told.output


# --- the misled teacher, and solutions of the prompts ---


def test_a_misled_teacher_is_wrong_where_a_multiplication_comes_first():
    wrong, right = misled.Misread(2, (("*", 3), ("+", 1))), misled.Misread(2, (("+", 1), ("*", 3)))
    assert chain.clean_text(wrong).response == "2*3=0;0+1=1#1"
    assert chain.clean_text(right).response == "2+1=3;3*3=2#2"


@pytest.mark.slow
def test_the_misled_teacher_is_built_once_and_a_run_with_it_resumes(tmp_path, monkeypatch, quick_student):
    monkeypatch.setattr(misled, "PHASE", dataclasses.replace(misled.PHASE, num_steps=1))
    path = resolve(from_dict({"teacher": {"path": configs.MISLED}})).teacher.path
    monkeypatch.setattr(misled, "PHASE", None)
    assert Path(path) == misled.teacher_dir() and embedded.is_embedded(path)
    assert AutoModelForCausalLM.from_pretrained(path).num_parameters() > 0 and AutoTokenizer.from_pretrained(path)
    stands_for = functools.partial(resuming._stands_for, before={}, student=configs.EMBEDDED)
    assert stands_for(configs.MISLED, path) and not stands_for(configs.MISLED, "/x")
    assert not stands_for(configs.EMBEDDED, path) and not stands_for(configs.OTHER_END, path)


@pytest.mark.parametrize("word", ["embedded-misled", "embedded-pairs"])
@pytest.mark.parametrize("role", ["teacher", "more_teachers.second"])
def test_a_teacher_of_the_defaults_problems_is_refused_before_the_harder_student_is_built(word, role):
    # It was told after the minute that building takes.
    with pytest.raises(InputError, match=f"{role}.path is {word}, a teacher of the problems of student.path=e"):
        configs.load(None, ["student.path=embedded-hard", f"{role}.path={word}"])


@pytest.mark.parametrize("count", ["0", "8193", "prompt", "²"])
def test_an_impossible_number_of_golden_solutions_is_refused_before_a_student_is_built(quick_student, count):
    with pytest.raises(InputError, match=f"golden=embedded:{count}: .* N from 1 to 8192, or embedded:prompts"):
        resolve(from_dict({"data": {"golden": f"embedded:{count}"}}))
    assert quick_student == []


def test_a_golden_file_whose_name_begins_like_the_word_is_ones_own():
    mine = {"prompts": "mine.jsonl", "golden": "embedded_solutions.jsonl"}
    config = from_dict({"data": mine})
    assert without_foreign_golden(config) == config  # it was refused as the embedded one


def test_the_prompts_own_solutions_are_golden(tmp_path, quick_student):
    resolved = resolve(from_dict({"data": {"golden": "embedded:prompts"}}))
    solved = {row["id"]: row["response"] for row in read(Path(resolved.data.golden))}
    assert solved.keys() == {row["id"] for row in read(Path(resolved.data.prompts))}
    assert all(chain.ChainTask().verify(solved[row["id"]], row) for row in read(Path(resolved.data.prompts))[:50])


def test_two_runs_may_write_the_prompts_own_solutions_at_once(monkeypatch, quick_student):
    """The bug: both wrote one file, and the second ended with a traceback when the first had renamed it."""
    config = from_dict({"data": {"golden": "embedded:prompts"}})
    write, number = embedded.write_rows, os.getpid()

    def beside_another(path, rows, **more):
        write(path, rows, **more)
        if path.name.startswith(".golden-prompts") and os.getpid() == number:
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: number + 1)
                resolve(config)

    monkeypatch.setattr(embedded, "write_rows", beside_another)
    golden = Path(resolve(config).data.golden)
    assert len(read(golden)) == embedded.NUM_PROMPTS
    assert not [path for path in golden.parent.iterdir() if path.name.startswith(".")]
