"""A task of the user's own: found where Python and the current directory have it, refused in one line otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_ray.run import preflight
from opd_ray.tasks import get_task
from opd_ray.tasks.judge import Judge
from tiny_checkpoints import configured, make_setting, refused

MINE = """
from opd_ray.tasks.words import InWords

class Mine(InWords):
    def verify(self, response, row):
        return response.endswith(row["answer"])

class Half:
    verify_limit_s = None
    def prompt(self, row):
        return row["prompt"]

class Demanding(Mine):
    def __init__(self, more):
        pass

not_a_class = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules in it."""
    (tmp_path / "own_task.py").write_text(MINE)
    (tmp_path / "torn_task.py").write_text("import no_such_library\n")
    (tmp_path / "odd_task.py").write_text("1 +\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_task", "torn_task", "odd_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_task:Mine", "there is no module 'no_task' in "),
        ("own_task:Min", "own_task.py has no class 'Min'; did you mean 'Mine'?"),
        ("own_task:not_a_class", "own_task.py has no class 'not_a_class'"),
        ("own_task:Half", "the class lacks privileged_prompt, verify, reads, load of opd_ray.tasks.Task; add them, or"),
        ("own_task:Demanding", "cannot be made without arguments (TypeError: "),
        ("torn_task:Mine", "torn_task cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"),
        ("odd_task:Mine", "odd_task cannot be imported (SyntaxError: "),
    ],
)
def test_one_that_cannot_be_had_is_refused(here: Path, name: str, message: str) -> None:
    said = refused(lambda: get_task(name))
    assert said.startswith(f"data.task={name}: ") and message in said


def test_its_verdicts_come_from_a_process_that_finds_it_as_well(here: Path) -> None:
    """That process does not start in the user's program, and is told not to look into the current directory."""
    with Judge(get_task("own_task:Mine")) as judge:
        assert judge.ask("verify", [("so 4", {"answer": "4"})]) == [True]


def test_preflight_takes_it(here: Path) -> None:
    config = configured(make_setting(here), data__task="own_task:Mine")
    assert preflight.check_files(config).num_prompts == 2


_CHECKED = """
import json, sys
from opd_ray import config as configs
from opd_ray.run import preflight
print(type(preflight.check_files(configs.load(None, json.loads(sys.argv[1]))).data.renderer.task).__name__)
"""


@pytest.mark.slow
def test_the_fork_that_checks_hands_it_over(here: Path) -> None:
    """The bug: a program elsewhere did not find the module again when the fork's answer came, and blamed the memory."""
    overrides = [f"{name}={value}" for name, value in (make_setting(here) | {"data.task": "own_task:Mine"}).items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", _CHECKED, json.dumps(overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "Mine"), done.stderr


def test_one_that_needs_torch_is_not_refused_where_the_checks_hide_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own_task.py").write_text("import torch\n" + MINE)
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError):
            get_task("own_task:Mine")
    assert get_task("own_task:Mine").verify("4", {"answer": "4"})
