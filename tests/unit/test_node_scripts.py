"""cluster/node, with stand-ins for the system's programs: what makes a machine a node, what stops an idle head."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NODE = Path(__file__).parents[2] / "cluster/node"
_SYSTEM = ("bash", "env", "seq", "ls", "head", "find", "touch", "timeout", "grep", "dirname", "cat", "cut")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose bin is the whole PATH: of the system no more than a script may count on."""
    (tmp_path / "bin").mkdir()
    for name in _SYSTEM:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    shutil.copytree(NODE, tmp_path / "node")
    return tmp_path


def _program(home: Path, name: str, text: str = "") -> None:
    """A program that notes how it was called."""
    path = home / name if "/" in name else home / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/bash\necho "${{0##*/}} $*" >> {home}/calls\n{text}\n')
    path.chmod(0o755)


def _run(home: Path, *words: str, **env: str) -> list[str]:
    subprocess.run(
        [home / "node" / words[0], *words[1:]],
        env={"HOME": str(home), "PATH": f"{home}/bin", **env},
        check=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    calls = home / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def _environment(home: Path) -> None:
    """What setup finds on a machine that has been a node: ~/dist, and ~/venv with uv."""
    (home / "dist").mkdir()
    for number, version in enumerate(("0.9", "1.0")):
        wheel = home / f"dist/opd_ray-{version}-py3-none-any.whl"
        wheel.touch()
        os.utime(wheel, (number, number))
    _program(home, "venv/bin/python", f'exec {sys.executable} "$@"')
    _program(home, "venv/bin/uv")


def test_setup_waits_for_a_machine_that_updates_itself_and_installs_what_it_lacks(home: Path) -> None:
    _environment(home)
    _program(home, "sudo", 'exec env "$@"')
    _program(home, "sleep")
    _program(home, "apt-get", f'[[ " $* " == *" update "* ]] && mkdir {home}/second 2>/dev/null && exit 100; exit 0')
    (home / "bin/mkdir").symlink_to(shutil.which("mkdir") or "mkdir")
    calls = [call for call in _run(home, "setup", "boto3", "s3fs") if not call.startswith("sudo")]
    assert [call.split()[0] for call in calls] == ["apt-get", "sleep", "apt-get", "apt-get", "uv"]
    assert calls[0] == "apt-get -qq -o DPkg::Lock::Timeout=600 update" == calls[2]
    assert calls[3].endswith("install -y python3-venv python3-dev build-essential")
    asked = calls[4]
    assert f"--constraints {home}/dist/gpu-lock.txt" in asked
    assert asked.endswith(f"{home}/dist/opd_ray-1.0-py3-none-any.whl[gpu,deepspeed,math] boto3 s3fs")


def test_setup_leaves_a_complete_machine_as_it_is_and_fetches_models(home: Path) -> None:
    _environment(home)
    _program(home, "gcc")
    _program(home, "python3")  # has the headers
    (home / "there/qwen").mkdir(parents=True)
    (home / "there/qwen/config.json").write_text("{}")
    calls = _run(home, "setup", MODELS=f"file://{home}/there")
    assert not any(call.startswith(("sudo", "apt-get")) for call in calls)
    assert (home / "models/qwen/config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("jobs", "logged_in", "idle_minutes", "stops"),
    [
        ("status=<JobStatus.SUCCEEDED: 'SUCCEEDED'>", "", 130, True),
        ("status=<JobStatus.SUCCEEDED: 'SUCCEEDED'>", "", 100, False),
        ("status=<JobStatus.RUNNING: 'RUNNING'>", "", 130, False),
        ("status=<JobStatus.PENDING: 'PENDING'>", "", 130, False),
        ("status=<JobStatus.SUCCEEDED: 'SUCCEEDED'>", "ubuntu pts/0", 130, False),
        ("", "", 130, True),  # a Ray that is dead costs as much
    ],
)
def test_a_head_is_stopped_when_nobody_has_used_it_for_two_hours(
    home: Path, jobs: str, logged_in: str, idle_minutes: int, stops: bool
) -> None:
    _program(home, "ray", f'[[ "$*" == "job list" && $RAY_AUTH_MODE == token ]] && echo "{jobs}"; [[ "{jobs}" ]]')
    _program(home, "who", f'echo -n "{logged_in}"')
    _program(home, "sudo")
    busy = home / "node/busy"
    busy.touch()
    then = time.time() - 60 * idle_minutes
    os.utime(busy, (then, then))
    assert ("sudo shutdown -h now" in _run(home, "idle-head")) == stops
    in_use = logged_in or "ING" in jobs
    assert (busy.stat().st_mtime > then + 60) == bool(in_use)


def test_the_watch_over_idle_heads_is_installed_once_beside_what_is_there(home: Path) -> None:
    _program(home, "crontab", f"if [[ $1 == -l ]]; then cat {home}/table; else cat > {home}/new; fi")
    (home / "table").write_text("0 0 * * * something\n")
    for _ in range(2):
        _run(home, "idle-head", "install")
        (home / "table").write_text((home / "new").read_text())
    lines = (home / "table").read_text().splitlines()
    assert lines == [
        "0 0 * * * something",
        f"*/10 * * * * {home}/node/idle-head",
        f"@reboot touch {home}/node/busy",
    ]
    assert (home / "node/busy").exists()
