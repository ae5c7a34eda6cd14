"""What `from opd_ray import ...` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import opd_ray
from opd_ray import Config
from opd_ray import config as configs
from opd_ray.errors import InputError


def test_what_is_offered_is_there_and_nothing_else() -> None:
    assert [callable(getattr(opd_ray, name)) for name in opd_ray.__all__] == [True] * 3
    assert all(getattr(opd_ray, name).__doc__ for name in opd_ray.__all__)
    assert set(opd_ray.__all__) <= set(dir(opd_ray)), "what a notebook completes"
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        from opd_ray import trian  # noqa: F401
    assert (Path(opd_ray.__file__).parent / "py.typed").is_file()


def test_a_module_of_the_package_does_not_take_the_place_of_a_function() -> None:
    """The bug: `opd_ray.evaluate` was the function until somebody imported the module of that name."""
    root = Path(opd_ray.__file__).parent
    assert [name for name in opd_ray.__all__ if (root / name).exists() or (root / f"{name}.py").exists()] == []


def test_the_import_alone_brings_nothing() -> None:
    heavy = "{'ray', 'torch', 'transformers', 'pydantic', 'omegaconf', 'numpy'} & sys.modules.keys()"
    said = subprocess.run(
        [sys.executable, "-c", f"import sys, opd_ray; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "set()\n"


def test_a_configuration_is_made_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 3\nlearner: {lr: 1.0e-4, steps: 7}\n")
    assert Config.load(file, "learner.steps=9") == configs.load(file, ["learner.steps=9"])
    assert Config.load(str(file), seed=4, learner={"steps": 8}) == configs.load(file, ["seed=4", "learner.steps=8"])
    assert Config.load(None, "learner.steps=9", learner={"steps": 8}).learner.steps == 9
    assert Config.load() == configs.load()
    assert Config.load().learner.lr != Config().learner.lr, "the embedded student's, and that of any size"


@pytest.mark.parametrize(
    ("sections", "said"),
    [({"lerner": {}}, "unknown field 'lerner'; did you mean 'learner'"), ({"seed": -1}, "seed: .*got -1")],
)
def test_what_a_section_says_is_checked(sections: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Config.load(**sections)
