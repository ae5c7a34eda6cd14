"""The Makefile: which environment is made and used on which machine. What installs is a fake."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_SETUP = """#!/bin/sh
echo "installs $1"
mkdir -p .venv-$1/bin
printf '#!/bin/sh\\necho runs in %s\\n' "$1" > .venv-$1/bin/python
chmod +x .venv-$1/bin/python
touch $2
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[str]]:
    """Calls make in a checkout; returns what it said. ``gpu`` is what `nvidia-smi -L` says there."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", ".ci/device", ".ci/link", ".ci/cpu-overrides.txt", ".ci/gpu-lock.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".ci/setup").write_text(FAKE_SETUP)
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin/nvidia-smi"

    def make(*arguments: str, gpu: str = "No devices found") -> list[str]:
        smi.write_text(f"#!/bin/sh\necho '{gpu}'\n")
        for program in (smi, tmp_path / ".ci/setup"):
            program.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        for name in ("DEVICE", "MAKEFLAGS", "MAKELEVEL", "ARGS"):
            environment.pop(name, None)
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return make


pytestmark = pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="would find this machine's GPU")
GPU = "GPU 0: NVIDIA H200 (UUID: GPU-1)"


def test_setup_finds_out_by_itself_what_the_machine_has(make: Callable[..., list[str]]) -> None:
    assert make("setup") == ["installs cpu"]
    assert make("setup", gpu=GPU) == ["installs gpu"]


def test_an_unchanged_checkout_installs_once(make: Callable[..., list[str]], tmp_path: Path) -> None:
    assert make("test") == ["installs cpu", "runs in cpu"]
    assert make("setup") == []
    assert make("test") == make("demo") == ["runs in cpu"]
    (tmp_path / "pyproject.toml").open("a").write("# changed\n")
    assert make("test") == ["installs cpu", "runs in cpu"]


def test_tests_run_in_the_environment_that_was_set_up(make: Callable[..., list[str]], tmp_path: Path) -> None:
    """The bug: after `make setup DEVICE=gpu`, `make test` installed the CPU's packages over those of the GPU."""
    assert make("setup") == ["installs cpu"]
    assert make("setup", "DEVICE=gpu") == ["installs gpu"]
    assert make("test") == ["runs in gpu"]
    assert make("test", "DEVICE=cpu") == ["runs in cpu"]
    assert make("test") == ["runs in cpu"]
    assert (tmp_path / ".venv/bin/python").is_file()
    make("clean")
    assert [path.name for path in tmp_path.glob(".venv*")] == []


def test_the_environment_of_an_older_checkout_is_kept(make: Callable[..., list[str]], tmp_path: Path) -> None:
    """It was a directory, whatever it was for."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready-gpu-123").touch()
    (tmp_path / ".venv/mine").touch()
    assert make("test") == ["installs cpu", "runs in cpu"]
    assert (tmp_path / ".venv-gpu/mine").exists() and (tmp_path / ".venv").is_symlink()
