"""Preflight: what it finds out, and every kind of setting it refuses, in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from opd_ray import config as configs
from opd_ray.config import Config, sections
from opd_ray.data.golden_problems import KINDS
from opd_ray.data.prompts import Prompts
from opd_ray.data.rendering import Renderer
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.embedded.resolve import without_foreign_golden
from opd_ray.errors import InputError
from opd_ray.models import checkpoints as models
from opd_ray.run import preflight, resuming
from opd_ray.run import train as running
from opd_ray.status import state
from opd_ray.tasks import get_task
from tiny_checkpoints import (
    CHARACTERS,
    configured,
    encode,
    make_checkpoint,
    make_setting,
    refused,
    write_jsonl,
    write_rollouts,
)

SFT = {
    "buffer__prompts_per_step": "0",
    "buffer__golden_per_step": "4",
    "loss__student__coef": "0",
    "loss__reference__coef": "0",
}
CHANGES = (
    "loss.golden.coef=0.5",
    "loss.student.coef=[[0, 0.1], [9, 1]]",
    "buffer.golden_per_prompt=2",
    "teacher.privileged=true",
    "more_teachers.code.path=/other",
    "rollout.max_response_tokens=[[0, 10], [9, 20]]",
    "data.golden_problems=skip",
)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_student_with_experts_is_refused_and_a_teacher_with_them_is_not(setting: dict[str, str], name: str) -> None:
    def put(role: str, experts: int) -> None:
        path = Path(setting[f"{role}.path"]) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: experts}))

    put("teacher", 8)
    put("student", 1)
    preflight.check_files(configured(setting))
    put("student", 64)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert message.startswith("student.path=") and "has 64 experts a layer" in message


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def test_a_good_setting_gives_what_the_run_needs(setting: dict[str, str]) -> None:
    facts = preflight.check_files(configured(setting))
    assert facts == preflight.Preflight(
        eos_token_ids=(1,),
        max_context_tokens=25,
        max_prompt_tokens=5,
        num_prompts=2,
        num_problems=1,
        prompts={"rows": 2, "used": 2, "held_out": 0, "over_length": 0, "unsolved": 0},
        golden={"rows": 1, "used": 1} | dict.fromkeys(KINDS, 0),
        data=facts.data,
    )


def test_engines_are_made_for_what_the_run_can_have_and_not_for_what_checkpoints_allow(
    setting: dict[str, str], tmp_path: Path
) -> None:
    """The bug: a model that takes 8,192 tokens needed a cache for so many, and died of it at a budget of 200."""
    make_checkpoint(tmp_path / "student", context=8192)
    config = configured(setting, rollout__max_response_tokens="20")
    assert preflight.check_files(config).max_context_tokens == 5 + 20


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_cache_that_does_not_hold_one_sequence_is_refused(setting: dict[str, str]) -> None:
    """vLLM would end while it starts, with advice about gpu_memory_utilization, which does nothing here."""
    small = configured(setting, rollout__engine="vllm", rollout__kv_cache_bytes="1000")
    assert "rollout.kv_cache_bytes=1000" in refused(lambda: preflight.check_files(small))


def test_engines_are_made_for_golden_sequences_as_well(setting: dict[str, str]) -> None:
    write_jsonl(Path(setting["data.golden"]), [{"prompt": "1+" * 12 + "1=", "answer": "13", "response": "1+1=2;" * 3}])
    facts = preflight.check_files(configured(setting))
    assert facts.max_context_tokens == 26 + 19 > facts.max_prompt_tokens + 20


def test_engines_are_made_for_prompts_that_a_privileged_teacher_is_shown(setting: dict[str, str]) -> None:
    rows = [{"id": each, "prompt": each, "answer": "2", "response": "1+1=2#2"} for each in ("1+1=", "12+1=")]
    write_jsonl(Path(setting["data.prompts"]), rows)
    write_jsonl(Path(setting["data.golden"]), rows)
    facts = preflight.check_files(configured(setting, teacher__privileged="true"))
    shown = max(len(facts.data.shown[i]) for i in range(facts.num_prompts))
    assert facts.max_context_tokens == shown + 20 > facts.max_prompt_tokens + 20


def test_an_evaluation_needs_only_the_student_and_the_problems(setting: dict[str, str]) -> None:
    config = configured(setting, teacher__path="/nowhere", data__prompts="/nowhere.jsonl")
    facts = preflight.check_evaluation(config)
    assert (facts.num_problems, facts.num_prompts, facts.max_prompt_tokens) == (1, 0, 4)


def test_parts_that_a_method_does_not_use_are_not_asked_for(setting: dict[str, str]) -> None:
    config = configured(setting, **SFT, teacher__path="/nowhere", reference__path="/nowhere")
    preflight.check_resources(config, lambda _: {"CPU": 1.0})
    assert preflight.check_files(config).golden["used"] == 1


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
    preflight.check_files(configured(setting))


def test_vocabularies_with_swapped_tokens_are_refused_by_the_first_of_them(
    setting: dict[str, str], tmp_path: Path
) -> None:
    swapped = list(CHARACTERS)
    swapped[5], swapped[6] = swapped[6], swapped[5]
    make_checkpoint(tmp_path / "teacher", tokens=swapped)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "teacher.path=" in message and "(token '2' is id 6 there, id 5 in the student's)" in message


@pytest.mark.slow
def test_markup_may_have_other_names_unless_a_prompt_holds_it(setting: dict[str, str], tmp_path: Path) -> None:
    """As Qwen2.5's <|im_start|> is <｜User｜> in DeepSeek-R1-Distill-Qwen, with the same ordinary tokens."""
    ours = [*CHARACTERS, "<user>"]
    make_checkpoint(tmp_path / "student", tokens=ours)
    make_checkpoint(tmp_path / "teacher", tokens=[*CHARACTERS, "<human>", "<more>"])
    preflight.check_files(configured(setting))
    template = "<user>{{ messages[0]['content'] }}"
    make_checkpoint(tmp_path / "student", tokens=ours, chat_template=template, context=200)
    make_checkpoint(tmp_path / "teacher", tokens=[*CHARACTERS, "<human>"], context=200)
    message = refused(lambda: preflight.check_files(configured(setting, data__task="math")))
    assert f"prompts.jsonl row 1: its prompt holds token {len(CHARACTERS)}, '<user>' in student.path=" in message
    assert "but '<human>' in teacher.path=" in message


# ---- the EOS set ----


def test_the_eos_set_is_that_of_all_models_with_the_students_own_first(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", eos=[2])
    assert preflight.check_files(configured(setting)).eos_token_ids == (1, 2)
    make_checkpoint(tmp_path / "student", eos=[2, 1])
    assert preflight.check_files(configured(setting)).eos_token_ids == (1, 2)


def test_a_scorer_may_be_said_to_end_with_other_tokens(setting: dict[str, str]) -> None:
    assert preflight.check_files(configured(setting, teacher__eos_token_ids="[2]")).eos_token_ids == (1, 2)


def test_a_model_that_is_not_loaded_adds_no_eos(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", eos=[2])
    sft = configured(setting, **SFT)
    assert preflight.check_files(sft).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[99]", "teacher.eos_token_ids names token 99, which the tokenizer of student.path="),
        ("[1, 5]", "teacher.eos_token_ids names token 5, which is '2' in student.path="),
    ],
)
def test_an_eos_of_no_or_of_an_ordinary_token_is_refused(setting: dict[str, str], ids: str, message: str) -> None:
    found = refused(lambda: preflight.check_files(configured(setting, teacher__eos_token_ids=ids)))
    assert message in found
    assert "set teacher.eos_token_ids to" in found


def test_a_teacher_that_ends_with_a_token_the_student_lacks_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", tokens=[*CHARACTERS, "<stop>"], eos=[len(CHARACTERS)])
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert f"ends with token {len(CHARACTERS)}, which the tokenizer of student.path=" in message
    assert message.startswith("teacher.path=")
    accepted = configured(setting, teacher__eos_token_ids="[1]")  # the message's advice
    assert preflight.check_files(accepted).eos_token_ids == (1,)


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


@pytest.mark.slow
def test_prompts_that_the_tokenizer_does_not_know_are_refused_or_said(setting: dict[str, str]) -> None:
    """The bug: they all looked the same to the student, as tokens of padding."""
    files = {field: Path(setting[field]) for field in ("data.evaluation", "data.prompts")}
    for field, file in files.items():
        rows = [{"prompt": each, "answer": "2"} for each in ("11111+1=", "zzü")]
        write_jsonl(file, rows)
        message = refused(lambda: preflight.check_files(configured(setting)))
        assert f"{field} {file} row 2: the tokenizer of student.path=" in message and "of its prompt 'zzü'" in message
        write_jsonl(file, [{"prompt": f"{file.stem[0]}111", "answer": "2"}])
    facts = preflight.check_files(configured(setting, data__task="math"))
    assert [note.partition(" does not know ")[2] for note in facts.data.notes] == ["25.0% of its tokens"] * 2


def test_the_longest_budget_of_a_schedule_must_fit(setting: dict[str, str]) -> None:
    growing = configured(setting, rollout__max_response_tokens="[[0, 10], [100, 59]]")
    preflight.check_files(growing)
    growing = configured(setting, rollout__max_response_tokens="[[0, 10], [100, 60]]")
    assert "rollout.max_response_tokens=60 are 65" in refused(lambda: preflight.check_files(growing))


def test_held_out_problems_in_golden_rollouts_are_refused(setting: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt_tokens": encode("3+3="), "response_tokens": [*encode("6"), 1]}]
    golden = write_rollouts(tmp_path / "golden.parquet", rows)
    message = refused(lambda: preflight.check_files(configured(setting, data__golden=str(golden))))
    assert f"{golden}: 1 of 1 rows cannot be trained on: 1 of held-out problems (row 1)" in message


def test_held_out_problems_that_are_trained_on_are_refused(setting: dict[str, str], tmp_path: Path) -> None:
    problems = [{"prompt": prompt, "answer": "0"} for prompt in ("5+5=", "12+1=", "1+1=")]
    write_jsonl(tmp_path / "test.jsonl", problems)
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "test.jsonl row 2: 2 of 3 held-out problems are also in" in message


@pytest.mark.slow
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
    rows = [{"prompt": "<long>" * 2}, {"prompt": "12+3="}, {"prompt": "1="}]
    assert Prompts("data.prompts", rows, Renderer(get_task("chain"), str(checkpoint))).longest() == (5, 2)


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
            {
                "rollout__engine": "vllm",
                "rollout__gpus_per_generator": "1",
                "rollout__tensor_parallel_size": "4",
                "teacher__gpus_per_actor": "1",
            },
            {"CPU": 8.0, "GPU": 4.0},
            "5 GPUs asked (generators 1 x 4, teacher 1 x 1), 4 there",
        ),
        (
            {"teacher__engine": "vllm", "teacher__gpus_per_actor": "1", "teacher__tensor_parallel_size": "4"},
            {"CPU": 8.0, "GPU": 3.0},
            "4 GPUs asked (teacher 1 x 4), 3 there",
        ),
        (
            {
                "buffer__teacher_per_prompt": "1",
                "loss__teacher__coef": "1",
                "rollout__teacher_generators": "3",
                "rollout__gpus_per_generator": "1",
            },
            {"CPU": 8.0, "GPU": 3.0},
            "4 GPUs asked (generators 1 x 1, teacher generators 3 x 1), 3 there",
        ),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    setting: dict[str, str], changes: dict[str, str], there: dict[str, float], message: str
) -> None:
    assert message in refused(lambda: preflight.check_resources(configured(setting, **changes), lambda _: there))


def test_an_elastic_pool_asks_for_its_minimum_only(setting: dict[str, str]) -> None:
    changes = {"rollout__num_generators": "6", "rollout__max_generators": "8", "rollout__cpus_per_generator": "1"}
    there = {"CPU": 3.0}
    config = configured(setting, **changes, rollout__min_generators="2")
    preflight.check_resources(config, lambda _: there)
    fixed = configured(setting, **changes)
    assert "generators 6 x 1" in refused(lambda: preflight.check_resources(fixed, lambda _: there))


def test_rooms_of_a_node_resource_must_fit_on_the_nodes_that_have_it(setting: dict[str, str]) -> None:
    there = {None: {"CPU": 64.0}, "spot": {"CPU": 2.0, "spot": 2.0}, "misspelt": {}}
    spot = {"rollout__node_resource": "spot", "rollout__cpus_per_generator": "1"}
    preflight.check_resources(configured(setting, **spot, rollout__num_generators="2"), there.__getitem__)
    many = configured(setting, **spot, rollout__num_generators="3")
    message = refused(lambda: preflight.check_resources(many, there.__getitem__))
    assert "3 CPUs asked on nodes with spot (generators 3 x 1), 2 there" in message
    misspelt = configured(setting, teacher__node_resource="misspelt")
    message = refused(lambda: preflight.check_resources(misspelt, there.__getitem__))
    assert "teacher ask for nodes with the custom resource 'misspelt'" in message


def test_a_missing_engine_is_refused_with_how_to_install_it(
    setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    message = refused(lambda: preflight.check_files(configured(setting, rollout__engine="vllm")))
    assert "vLLM is not installed" in message
    assert "make setup" in message
    small = configured(setting, rollout__engine="auto")
    preflight.check_files(small)
    monkeypatch.setattr(sections, "_LARGE_MODEL", 1)
    expected = message.replace("engine=vllm,", "engine=auto, which takes vLLM for this model,")
    assert refused(lambda: preflight.check_files(small)) == expected != message  # it once named a value nobody had set


def test_adapters_are_refused_before_a_model_loads(setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**changes: str) -> str:
        return refused(lambda: preflight.check_files(configured(setting, **changes)))

    assert "finds no linear layers of a transformer's blocks" in said(student__lora="{}")
    layer = {"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}
    save_file(layer, Path(setting["student.path"]) / "model.safetensors")
    assert preflight.check_files(configured(setting, student__lora="{}"))
    assert "ends with 'upproj'; did you mean 'up_proj'?" in said(student__lora__targets="[upproj]")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    assert "student.lora needs peft, which is not installed; pip install 'opd_ray[lora]'" in said(student__lora="{}")


# ---- the run directory ----


def test_a_directory_with_another_run_needs_resume(setting: dict[str, str], tmp_path: Path) -> None:
    config, run_dir = configured(setting), tmp_path / "run"
    resuming.check_run_dir(run_dir, config, resume=False)
    assert "no run to resume" in refused(lambda: resuming.check_run_dir(run_dir, config, resume=True))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    assert "holds another run" in refused(lambda: resuming.check_run_dir(run_dir, config, resume=False))
    resuming.check_run_dir(run_dir, config, resume=True)


def test_a_run_that_somebody_still_works_on_is_not_resumed(setting: dict[str, str], tmp_path: Path) -> None:
    config = configured(setting)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    here = {"pid": os.getppid(), "host": socket.gethostname(), "phase": "training", "phase_since_s": 1.0, "step": 3}
    rest = {"steps": 9, "version": 3, "last_step_s_ago": 1.0, "slots_taken": 0, "num_slots": 8, "buffered_slots": 0}
    last = state.Status(time=time.time(), **here, **rest, missing_slots=(), slots_at={}, checkpoint_step=None, rooms=())
    state.write(tmp_path / state.FILE, last)
    message = refused(lambda: resuming.check_run_dir(tmp_path, config, resume=True))
    assert f"process {os.getppid()} on this machine is still working on this run" in message
    state.write(tmp_path / state.FILE, replace(last, phase="failed"))
    resuming.check_run_dir(tmp_path, config, resume=True)
    other = configured(setting, seed="9")
    assert "holds another run" in refused(lambda: resuming.check_run_dir(tmp_path, other, resume=False))
    # The bug: a run whose rooms did not start kept the corrected one out of its directory.
    state.write(tmp_path / state.FILE, replace(last, phase="failed", step=0))
    for resume in (False, True):
        resuming.check_run_dir(tmp_path, other, resume=resume)


def test_a_run_that_another_machine_still_works_on_is_not_resumed(setting: dict[str, str], tmp_path: Path) -> None:
    """The bug: a second driver was let in from another host, though the status was a tenth of a second old."""
    config = configured(setting)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    there = {"pid": 7, "host": "elsewhere", "phase": "training", "phase_since_s": 1.0, "step": 3}
    rest = {"steps": 9, "version": 3, "last_step_s_ago": 1.0, "slots_taken": 0, "num_slots": 8, "buffered_slots": 0}
    last = state.Status(
        time=time.time(), **there, **rest, missing_slots=(), slots_at={}, checkpoint_step=None, rooms=()
    )
    state.write(tmp_path / state.FILE, last)
    message = refused(lambda: resuming.check_run_dir(tmp_path, config, resume=True))
    assert "process 7 on elsewhere, which wrote status.json" in message
    for over in (replace(last, time=last.time - state.STALE_S), replace(last, phase="failed")):
        state.write(tmp_path / state.FILE, over)
        resuming.check_run_dir(tmp_path, config, resume=True)


@pytest.mark.parametrize(
    "change", ["seed=1", "student.path=/other", "data.task=math", "learner.dtype=bfloat16", *CHANGES]
)
def test_a_resumed_run_must_be_the_same_run(setting: dict[str, str], tmp_path: Path, change: str) -> None:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configured(setting)))
    name, _, value = change.partition("=")
    message = refused(lambda: resuming.check_run_dir(tmp_path, configured(setting | {name: value}), resume=True))
    assert message.startswith(f"--resume: {name.removesuffix('.code.path')}")
    assert "continue it with" in message


@pytest.mark.parametrize(
    "change",
    [
        "learner.steps=999",
        "learner.num_ranks=2",
        "learner.zero_stage=3",
        "rollout.max_generators=4",
        "teacher.num_actors=2",
        "teacher.max_actors=3",
        "teacher.node_resource=teacher_node",
        "buffer.max_staleness=0",
    ],
)
def test_a_resumed_run_may_change_what_does_not_matter(setting: dict[str, str], tmp_path: Path, change: str) -> None:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configured(setting)))
    name, _, value = change.partition("=")
    resuming.check_run_dir(tmp_path, configured(setting | {name: value}), resume=True)


@pytest.mark.parametrize(
    ("name", "saved", "again", "same"),
    [
        ("data.golden", "golden-32.jsonl", "embedded:32", True),
        ("data.golden", "golden-32.jsonl", "embedded", False),
        ("data.golden", "golden.jsonl", "embedded", True),
        ("data.golden", "mine.jsonl", "embedded", False),
        ("data.golden", "golden-prompts.jsonl", "embedded:prompts", True),
    ],
)
def test_a_stand_in_continues_only_what_it_stood_for(
    setting: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    saved: str,
    again: str,
    same: bool,
) -> None:
    """The bug: any run could be resumed with the embedded models and data in the place of its own."""
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / ("elsewhere" if saved == "mine.jsonl" else "cache/chain-1-seed0") / saved
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configured(setting | {name: str(path)})))
    now = configured(setting | {name: again})
    if same:
        resuming.check_run_dir(tmp_path, now, resume=True)
    else:
        assert "--resume: data.golden is" in refused(lambda: resuming.check_run_dir(tmp_path, now, resume=True))


def test_a_run_without_golden_rollouts_is_continued_with_the_arguments_that_began_it(tmp_path: Path) -> None:
    """The bug: it is saved without the embedded golden solutions, of another task, which the arguments still name."""
    mine = ["student.path=/s", "teacher.path=/t", "data.prompts=p", "data.evaluation=e"]
    without = ["loss.golden.coef=0", "buffer.golden_per_prompt=0", "guard.max_golden_per_prompt=0"]
    asked = configs.load(None, [*mine, *without])
    (tmp_path / "config.yaml").write_text(configs.to_yaml(without_foreign_golden(asked)))
    resuming.check_run_dir(tmp_path, asked, resume=True)
    other = configs.load(None, [*mine, *without, "data.golden=g"])
    assert "data.golden is g" in refused(lambda: resuming.check_run_dir(tmp_path, other, resume=True))


def test_the_embedded_default_is_continued_from_another_copy_of_the_package() -> None:
    """The bug: a job's run could not be resumed: its teacher lay in the copy of the package that went with the job."""
    asked = Config()
    saved = configs.to_dict(asked)
    saved["teacher"]["path"] = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/" + "/".join(
        TEACHER_DIR.parts[-4:]
    )
    resuming.check_same_run("the checkpoint", saved, asked)
    saved["teacher"]["path"] = "/models/chain_teacher"
    assert "--resume: teacher.path is embedded" in refused(lambda: resuming.check_same_run("it", saved, asked))


def test_a_run_of_the_harder_setting_is_continued_as_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path))
    asked = configs.load(None, ["student.path=embedded-hard"])
    saved = configs.to_dict(asked)
    saved["student"]["path"] = str(tmp_path / "chain-hard-1f-seed0" / "student")
    saved["teacher"]["path"] = str(tmp_path / "chain-hard-teacher-1f")
    resuming.check_same_run("it", saved, asked)
    for field in ("teacher.path=embedded-other-end", "student.path=embedded"):
        other = configs.load(None, ["student.path=embedded-hard", "rollout.max_response_tokens=128", field])
        message = refused(lambda other=other: resuming.check_same_run("it", saved, other))
        assert f"--resume: {field.replace('=', ' is ')}, but it has" in message


def test_a_checkpoint_with_a_field_of_another_version_is_refused_without_advice_that_cannot_be_followed() -> None:
    """The bug: it said "continue it with loss.advantage.scale=1.0", which then was an unknown field."""
    saved = configs.to_dict(Config())
    saved["loss"]["advantage"]["scale"] = 1.0
    message = refused(lambda: resuming.check_same_run("the checkpoint", saved, Config()))
    assert "the checkpoint has loss.advantage.scale=1.0, a field that this version of opd_ray does not have" in message
    assert "continue it with" not in message


def test_a_checkpoint_from_before_a_field_had_its_default() -> None:
    """The bug: "horizon_probes is 0.25, but the checkpoint has null; continue it with null", which no run takes."""
    saved = configs.to_dict(configs.load())
    for name in ("horizon", "horizon_probes", "repetition_detection"):
        del saved["rollout"][name]
    resuming.check_same_run("the checkpoint", saved, configs.load())
    other = configs.load(None, ["rollout.horizon_probes=0.5"])
    message = refused(lambda: resuming.check_same_run("the checkpoint", saved, other))
    assert "continue it with rollout.horizon_probes=0.25" in message


@pytest.mark.parametrize("field", ["rollout.repetition_detection.min_pattern_size=1", "student.lora.rank=4"])
def test_a_run_with_a_section_is_not_continued_without_it_and_the_advice_can_be_followed(field: str) -> None:
    """The bug: "a field that this version of opd_ray does not have", or "continue it with NAME.min_count=null"."""
    having, lacking = configs.load(None, [field]), configs.load()
    for ours, theirs in ((lacking, having), (having, lacking)):
        message = refused(lambda ours=ours, theirs=theirs: resuming.check_same_run("it", configs.to_dict(theirs), ours))
        (advice,) = re.findall(r"continue it with (.*) or give another", message)
        resuming.check_same_run("it", configs.to_dict(theirs), configs.load(None, [advice]))


def test_the_saved_configuration_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: config.yaml held a path into the copy of the package that went with the job."""

    def driver(config: Config, *_: object) -> None:
        assert config.teacher.path == str(TEACHER_DIR)
        raise InputError("far enough")

    student = replace(Config().student, path="/student")
    monkeypatch.setattr(running, "resolve", lambda asked: replace(with_teacher(asked), student=student))
    monkeypatch.setattr(running, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(running, "find_start", lambda *_, **__: (mock.Mock(), None))
    monkeypatch.setattr(running, "nodes", list)
    monkeypatch.setattr(preflight, "check_files", lambda *_: mock.Mock(commits={}))
    for check in ("check_weights", "check_resources"):
        monkeypatch.setattr(preflight, check, lambda *_: None)
    monkeypatch.setattr("opd_ray.run.driver.Driver", driver)
    assert refused(lambda: running.train(Config(), tmp_path / "run")) == "far enough"
    assert configs.load(tmp_path / "run/config.yaml") == Config()


def with_teacher(config: Config) -> Config:
    return replace(config, teacher=replace(config.teacher, path=str(TEACHER_DIR)))
