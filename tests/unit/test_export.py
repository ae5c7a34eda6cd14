"""The student of a checkpoint, in Hugging Face format."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fake_shelves import Objects
from opd_ray import config as configs
from opd_ray.learn.adapters import Adapters
from opd_ray.models.adapters import adapted_layers
from opd_ray.run.export import export, run_of, student_in
from opd_ray.snapshots import Shelf, Snapshot
from tiny_checkpoints import configured, make_setting, refused


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4, in which every weight is the student's plus the step."""
    root = tmp_path_factory.mktemp("export")
    config = configured(make_setting(root))
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text(configs.to_yaml(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.student.path))
    model.save_pretrained(config.student.path)
    objects = Objects()
    shelf = Shelf(str(run / "checkpoints"), objects)
    for step in (2, 4):
        arrays = {
            f"weight/{name}": value.detach().numpy() + np.float32(step) for name, value in model.named_parameters()
        }
        halves = [dict(list(arrays.items())[rank::2]) for rank in range(2)]
        parts = tuple(objects.put(half | {f"rng/{rank}": np.zeros(3, np.uint8)}) for rank, half in enumerate(halves))
        asyncio.run(shelf.write(Snapshot(step, {}, parts, state={"healthy": True}), keep=2))
    return run


def added(directory: str | Path, run_dir: Path) -> float:
    """By how much a student's first weight lies above that of the one that the run began with."""
    begun = AutoModelForCausalLM.from_pretrained(configs.load(run_dir / "config.yaml").student.path)
    found = AutoModelForCausalLM.from_pretrained(directory)
    differences = [(mine - its).mean() for mine, its in zip(found.parameters(), begun.parameters(), strict=True)]
    assert torch.stack(differences).std() < 1e-4
    return round(float(differences[0]), 3)


@pytest.mark.slow
def test_the_newest_or_a_given_step_is_written_with_its_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    assert added(export(run_dir, 2, tmp_path / "second"), run_dir) == 2
    newest = export(run_dir, None)
    assert newest == run_dir / "student-step-4"
    assert added(newest, run_dir) == 4
    assert (newest / "tokenizer.json").is_file()
    assert "is there already" in refused(lambda: export(run_dir, 4))


@pytest.mark.slow
def test_a_run_directory_or_a_checkpoint_stands_for_its_student(run_dir: Path, tmp_path: Path) -> None:
    """The bug: `evaluate` on either said that it had no config.json."""
    with student_in(str(run_dir / "checkpoints" / "step-2")) as student:
        assert added(student, run_dir) == 2
    with student_in(str(run_dir)) as student:  # one that was cut off before its end has no student yet
        assert added(student, run_dir) == 4
    assert run_of(run_dir / "checkpoints" / "step-2") == run_of(run_dir) == run_of(run_dir / "student") == run_dir
    assert run_of(tmp_path) is None
    with student_in("somebody/model") as student:
        assert student == "somebody/model"


def test_what_is_no_checkpoint_of_the_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint of step 3; complete ones: 2, 4" in refused(lambda: export(run_dir, 3))
    assert "is no run directory" in refused(lambda: export(tmp_path, None))


@pytest.mark.slow
def test_of_a_run_that_trains_adapters_the_merged_student_and_they_alone_are_written(tmp_path: Path) -> None:
    from peft import PeftModel

    config = configured(make_setting(tmp_path), student__lora__rank="2", student__lora__alpha="4")
    student = Path(config.student.path)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student)).save_pretrained(student)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(configs.to_yaml(config))
    objects, shelf_of = Objects(), str(run / "checkpoints")
    base = AutoModelForCausalLM.from_pretrained(student)
    adapters = Adapters(base, adapted_layers("here", student, config.student.lora), config.student.lora)
    arrays = {f"weight/{name}": np.full(weight.shape, 0.1, np.float32) for name, weight in adapters.weights()}
    for step, kept in ((1, arrays), (2, dict(list(arrays.items())[1:]))):
        part = objects.put(kept)
        asyncio.run(Shelf(shelf_of, objects).write(Snapshot(step, {}, (part,), state={"healthy": True}), keep=2))

    written = export(run, 1)
    begun, found = AutoModelForCausalLM.from_pretrained(student), AutoModelForCausalLM.from_pretrained(written)
    for (name, before), after in zip(begun.named_parameters(), found.parameters(), strict=True):
        # scale · B A of rank 2, all of it .1
        torch.testing.assert_close(after - before, torch.full_like(before, 0.04 * name.endswith("proj.weight")))
    alone = PeftModel.from_pretrained(begun, written / "adapter")
    assert (alone(torch.arange(4)[None]).logits - found(torch.arange(4)[None]).logits).abs().max() < 1e-4
    assert alone.peft_config["default"].base_model_name_or_path == str(student)
    assert "they differ in 1 parameters" in refused(lambda: export(run, 2))
