"""Preflight: what it finds out, and every kind of setting it refuses, in one line that says what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkpoints import CHARACTERS, make_checkpoint, make_setting, write_jsonl
from opd_ray import config as configs
from opd_ray import models, preflight
from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.tasks import get_task


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def configured(setting: dict[str, str], **changes: str) -> Config:
    merged = setting | {name.replace("__", "."): value for name, value in changes.items()}
    return configs.load(None, [f"{name}={value}" for name, value in merged.items()])


def refused(check: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_setting_gives_what_the_run_needs(setting: dict[str, str]) -> None:
    facts = preflight.check_files(configured(setting))
    assert facts == preflight.Preflight(
        eos_token_ids=(1,),
        pad_token_id=0,
        vocab_size=len(CHARACTERS),
        tied_embeddings=True,
        max_context_tokens=64,
        max_prompt_tokens=5,
        num_prompts=2,
        num_golden=1,
        num_problems=1,
    )


def test_the_context_is_the_smallest_of_the_models_and_the_cap(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", context=48)
    assert preflight.check_files(configured(setting)).max_context_tokens == 48
    capped = configured(setting, student__max_context_tokens="30")
    assert preflight.check_files(capped).max_context_tokens == 30


def test_an_evaluation_needs_only_the_student_and_the_problems(setting: dict[str, str]) -> None:
    config = configured(setting, teacher__path="/nowhere", data__prompts="/nowhere.jsonl")
    facts = preflight.check_evaluation(config)
    assert (facts.num_problems, facts.num_prompts, facts.max_prompt_tokens) == (1, 0, 4)


def test_parts_that_a_method_does_not_use_are_not_asked_for(setting: dict[str, str]) -> None:
    config = configured(
        setting,
        buffer__prompts_per_step="0",
        buffer__golden_per_step="4",
        loss__opd_coef="0",
        loss__reference_kl_coef="0",
        teacher__path="/nowhere",
        reference__path="/nowhere",
    )
    preflight.check_resources(config, {"CPU": 1.0})
    assert preflight.check_files(config).num_golden == 1


# ---- checkpoints ----


def test_a_missing_checkpoint_is_refused(setting: dict[str, str]) -> None:
    message = refused(lambda: preflight.check_files(configured(setting, teacher__path="/no/where/at/all")))
    assert message.startswith("teacher.path=/no/where/at/all: no such directory")


def test_a_name_that_no_hub_knows_is_refused_at_once(setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: transformers alone retries for half a minute, with a line on stderr for each try."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    message = refused(lambda: preflight.check_files(configured(setting, student__path="nobody/nothing")))
    assert message.startswith("student.path=nobody/nothing: neither a directory here nor a checkpoint")


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "has no config.json"), ("tokenizer", "has no tokenizer"), ("model.safetensors", "has no weights")],
)
def test_an_incomplete_checkpoint_is_refused(setting: dict[str, str], tmp_path: Path, file: str, message: str) -> None:
    for path in (tmp_path / "student").glob(f"{file}*"):
        path.unlink()
    assert message in refused(lambda: preflight.check_files(configured(setting)))


def test_damaged_weights_are_refused(setting: dict[str, str], tmp_path: Path) -> None:
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refused(lambda: preflight.check_files(configured(setting)))


def test_a_missing_shard_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "student" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00002-of-00002.safetensors" in refused(lambda: preflight.check_files(configured(setting)))


def test_a_tokenizer_larger_than_its_model_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "student", vocab_size=10)
    assert "vocab_size 10" in refused(lambda: preflight.check_files(configured(setting)))


# ---- agreement of student and scorers ----


def test_output_layers_padded_to_different_sizes_are_accepted(setting: dict[str, str], tmp_path: Path) -> None:
    """As Qwen2.5's are: one tokenizer, but 151,936 rows in the 1.5B model and 152,064 in the 7B one."""
    make_checkpoint(tmp_path / "teacher", vocab_size=32)
    assert preflight.check_files(configured(setting)).vocab_size == len(CHARACTERS)


def test_vocabularies_with_swapped_tokens_are_refused_by_the_first_of_them(
    setting: dict[str, str], tmp_path: Path
) -> None:
    swapped = list(CHARACTERS)
    swapped[5], swapped[6] = swapped[6], swapped[5]
    make_checkpoint(tmp_path / "teacher", tokens=swapped)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "token '2' is id 6 in teacher.path=" in message
    assert "but id 5 in student.path=" in message


def test_eos_sets_that_differ_are_refused_until_they_are_mapped(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", eos=[2])
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "EOS sets differ" in message
    assert "ends with [1]" in message
    assert "teacher.eos_map='{1: 2}'" in message  # the message's advice, followed to the letter:
    assert preflight.check_files(configured(setting, teacher__eos_map="{1: 2}")).eos_token_ids == (1,)


def test_a_scorer_with_more_eos_needs_a_declaration_too(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", eos=[1, 2])
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "teacher.eos_map='{1: 1}'" in message
    preflight.check_files(configured(setting, teacher__eos_map="{1: 1}"))


@pytest.mark.parametrize(("eos_map", "token"), [("{3: 1}", "token 3"), ("{1: 4}", "token 4")])
def test_a_mapping_of_tokens_that_are_no_eos_is_refused(setting: dict[str, str], eos_map: str, token: str) -> None:
    message = refused(lambda: preflight.check_files(configured(setting, teacher__eos_map=eos_map)))
    assert f"teacher.eos_map names {token}, which is no EOS" in message


def test_the_tokenizers_own_eos_comes_first(tmp_path: Path) -> None:
    facts = models.inspect("student.path", str(make_checkpoint(tmp_path / "student", eos=[2, 1])))
    assert facts.eos_token_ids == (1, 2)


# ---- lengths and data ----


def test_a_prompt_that_leaves_no_room_is_refused_by_file_and_row(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", context=24)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert f"data.prompts {tmp_path / 'prompts.jsonl'} row 2: its 5 prompt tokens" in message
    assert "are 25, more than the context of 24 of teacher.path=" in message
    assert "rollout.max_response_tokens=19" in message
    preflight.check_files(configured(setting, rollout__max_response_tokens="19"))


def test_golden_rows_must_fit_with_their_eos(setting: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "1=", "response": "1" * 61}, {"prompt": "1=", "response": "1" * 62}]
    write_jsonl(tmp_path / "golden.jsonl", rows)
    assert "golden.jsonl row 2: prompt, response and EOS have 65 tokens" in refused(
        lambda: preflight.check_files(configured(setting))
    )


def test_golden_rows_must_not_bring_an_eos_of_their_own(setting: dict[str, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "golden.jsonl", [{"prompt": "1=", "response": "1<eos>"}])
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "golden.jsonl row 1: the response contains the EOS '<eos>'" in message


def test_held_out_problems_that_are_trained_on_are_refused(setting: dict[str, str], tmp_path: Path) -> None:
    problems = [{"prompt": prompt, "answer": "0"} for prompt in ("5+5=", "12+1=", "1+1=")]
    write_jsonl(tmp_path / "test.jsonl", problems)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "test.jsonl row 2: 2 of 3 held-out problems are also in" in message


def test_a_large_prompt_file_takes_under_three_seconds(setting: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:05d}+{i % 7}=", "answer": "0"} for i in range(60_000)]
    write_jsonl(tmp_path / "prompts.jsonl", [*rows, {"prompt": "1" * 30 + "=", "answer": "0"}])
    config = configured(setting)
    preflight.check_evaluation(config)  # imports transformers
    began = time.process_time()
    facts = preflight.check_files(config)
    assert time.process_time() - began < 3
    assert (facts.num_prompts, facts.max_prompt_tokens) == (60_001, 31)


def test_the_longest_prompt_is_found_among_tokens_of_unequal_length(tmp_path: Path) -> None:
    """The search goes by bytes; a shorter text with more tokens must still win."""
    checkpoint = make_checkpoint(tmp_path / "student", tokens=[*CHARACTERS, "<long>"])
    tokenizer = models.inspect("student.path", str(checkpoint)).tokenizer
    rows = [{"prompt": "<long>" * 2}, {"prompt": "12+3="}, {"prompt": "1="}]
    assert preflight._longest_prompt("data.prompts", rows, get_task("chain"), tokenizer) == (5, 2)


# ---- cluster and packages ----


@pytest.mark.parametrize(
    ("changes", "there", "message"),
    [
        ({"learner__num_ranks": "20"}, {"CPU": 2.0}, "10.7 CPUs asked (learner 20 x 0.5, generators 1 x 0.5"),
        (
            {"learner__gpus_per_rank": "1", "learner__num_ranks": "2"},
            {"CPU": 2.0},
            "2 GPUs asked (learner 2 x 1), 0 there",
        ),
        (
            {"rollout__gpus_per_generator": "1", "rollout__tensor_parallel_size": "4", "teacher__gpus_per_actor": "1"},
            {"CPU": 8.0, "GPU": 4.0},
            "5 GPUs asked (generators 1 x 4, teacher 1 x 1), 4 there",
        ),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    setting: dict[str, str], changes: dict[str, str], there: dict[str, float], message: str
) -> None:
    assert message in refused(lambda: preflight.check_resources(configured(setting, **changes), there))


def test_a_missing_engine_is_refused_with_how_to_install_it(
    setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    message = refused(lambda: preflight.check_files(configured(setting, rollout__engine="vllm")))
    assert "vLLM is not installed" in message
    assert "make setup" in message


# ---- the run directory ----


def test_a_directory_with_another_run_needs_resume(setting: dict[str, str], tmp_path: Path) -> None:
    config, run_dir = configured(setting), tmp_path / "run"
    preflight.check_run_dir(run_dir, config, resume=False)
    assert "no run to resume" in refused(lambda: preflight.check_run_dir(run_dir, config, resume=True))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    assert "holds another run" in refused(lambda: preflight.check_run_dir(run_dir, config, resume=False))
    preflight.check_run_dir(run_dir, config, resume=True)


@pytest.mark.parametrize("change", ["seed=1", "student.path=/other", "data.task=math", "learner.num_ranks=2"])
def test_a_resumed_run_must_be_the_same_run(setting: dict[str, str], tmp_path: Path, change: str) -> None:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configured(setting)))
    name, _, value = change.partition("=")
    message = refused(lambda: preflight.check_run_dir(tmp_path, configured(setting | {name: value}), resume=True))
    assert message.startswith(f"--resume: {name} is ")


@pytest.mark.parametrize("change", ["learner.steps=999", "teacher.num_actors=2", "student.path=embedded"])
def test_a_resumed_run_may_change_what_does_not_matter(setting: dict[str, str], tmp_path: Path, change: str) -> None:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configured(setting)))
    name, _, value = change.partition("=")
    preflight.check_run_dir(tmp_path, configured(setting | {name: value}), resume=True)
