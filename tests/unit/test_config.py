"""Configuration: defaults, YAML, overrides, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import InputError


def test_file_and_overrides_are_merged_over_the_defaults_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nlearner:\n  lr: 1.0e-4\n  steps: 7\n")
    config = configs.load(file, ["learner.steps=9", "teacher.eos_map={1: 2}"])
    assert (config.seed, config.learner.lr, config.learner.steps) == (3, 1e-4, 9)
    assert config.teacher.eos_map == {1: 2}
    assert config.rollout == Config().rollout


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = configs.load(None, ["data.golden=null", "buffer.golden_per_prompt=0", "loss.sft_coef=0", "seed=5"])
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(config))
    assert configs.load(file) == config


def test_every_field_has_a_sentence_and_a_default() -> None:
    docs = {doc.name: doc for doc in configs.describe()}
    assert docs["learner.lr"].default == Config().learner.lr
    assert not [name for name, doc in docs.items() if not doc.doc.endswith(".")]
    assert len(docs) == sum(
        len(dataclasses.fields(value)) if dataclasses.is_dataclass(value) else 1 for value in vars(Config()).values()
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.lrr=1"], "unknown field 'learner.lrr'; did you mean 'learner.lr'?"),
        (["leaner.lr=1"], "unknown field 'leaner'; did you mean 'learner'?"),
        (["sede=1"], "unknown field 'sede'; did you mean 'seed'?"),
        (["learner.lr=fast"], "learner.lr"),
        (["learner.lr=0"], "learner.lr"),
        (["learner.zero_stage=4"], "learner.zero_stage"),
        (["learner=3"], "learner"),
        (["rollout.engine=sglang"], "rollout.engine"),
        (["seed"], "override 'seed' is not of the form section.field=value"),
        (["data.golden=null"], "data.golden is null"),
        (["buffer.golden_per_prompt=0"], "loss.sft_coef"),
        (["buffer.prompts_per_step=0", "buffer.golden_per_prompt=0"], "train on nothing"),
        (["weights.backend=nccl"], "needs GPUs"),
    ],
)
def test_impossible_values_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        configs.load(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected a mapping"),
        ("a: [1\n", "run.yaml"),
        (None, "No such file"),
        ("a: 1\n", "unknown field 'a'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        configs.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ([], "stableopd"),
        (["loss.reference_kl_coef=0"], "opd+mixture"),
        (["buffer.golden_per_prompt=0", "loss.sft_coef=0"], "opd+reference_kl"),
        (["buffer.golden_per_prompt=0", "loss.sft_coef=0", "loss.reference_kl_coef=0"], "opd"),
        (
            ["buffer.prompts_per_step=0", "buffer.golden_per_step=8", "loss.opd_coef=0", "loss.reference_kl_coef=0"],
            "sft",
        ),
    ],
)
def test_the_method_is_named_after_what_the_coefficients_amount_to(overrides: list[str], method: str) -> None:
    assert configs.load(None, overrides).method == method


def test_setting_another_field_of_the_reference_leaves_it_the_student() -> None:
    """The bug: given one field, the section forgot that its path is the student's and took the teacher's."""
    assert configs.load(None, ["reference.num_actors=2"]).reference.path == configs.STUDENT
