"""cluster/node, with stand-ins for the system's programs: what makes a machine a node, what stops an idle head."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import psutil
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
    extras = "gpu,deepspeed,math,data,gym,gguf,lora,wandb,mlflow"
    assert asked.endswith(f"{home}/dist/opd_ray-1.0-py3-none-any.whl[{extras}] boto3 s3fs")


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


_DRIVER = """
import signal, subprocess, sys, time
from pathlib import Path

started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # nobody else's to end

def save(*_):
    assert started.poll() is None
    started.kill()
    Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path("runs").touch()
time.sleep(60)
"""
_POD = f"""
bash -c 'exec -a ray::IDLE sleep 60' &
bash -c 'exec -a ray::Learner.train sleep 1' &
RAY_JOB_CONFIG_JSON_ENV_VAR={{}} sh -c '{NODE}/job {sys.executable} driver.py; echo $? > code' &
sleep 60
"""
"""A job's command as Ray runs it, in a shell that would die of SIGTERM, beside an actor and an idle worker."""


@pytest.mark.slow
def test_before_a_pod_ends_its_driver_saves_and_its_actors_have_ended(tmp_path: Path) -> None:
    """SIGTERM to `ray start --block` never reached a driver."""
    (tmp_path / "driver.py").write_text(_DRIVER)
    pod = subprocess.Popen(["bash", "-c", _POD], cwd=tmp_path, start_new_session=True)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "runs").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        command = [sys.executable, NODE / "pre-stop", str(pod.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout.count("asking driver") == 1
        assert (tmp_path / "saved").exists()
        until = time.monotonic() + 20
        while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert (tmp_path / "code").read_text() == "143\n"
        left = psutil.Process(pod.pid).children()
        alive = [" ".join(each.cmdline()) for each in left if each.status() != psutil.STATUS_ZOMBIE]
        assert alive == ["ray::IDLE 60"]
    finally:
        os.killpg(pod.pid, signal.SIGKILL)
        pod.wait()


@pytest.mark.parametrize(("code", "stops"), [(0, False), (1, False), (2, True), (3, True), (143, False)])
def test_a_job_is_stopped_for_good_where_a_new_cluster_would_not_mend_it(home: Path, code: int, stops: bool) -> None:
    """The bug: a refused configuration was tried five times, each on a new cluster."""
    _program(home, "python", f'exec {sys.executable} "$@"')
    _program(home, "ray")
    _program(home, "sleep")
    _program(home, "trains", f"exit {code}")
    about = json.dumps({"metadata": {"job_submission_id": "opd-ray-first-x"}})
    done = subprocess.run(
        [home / "node/job", "trains"],
        env={"HOME": str(home), "PATH": f"{home}/bin", "RAY_JOB_CONFIG_JSON_ENV_VAR": about},
        timeout=30,
    )
    assert done.returncode == code
    asked = [call for call in (home / "calls").read_text().splitlines() if call.startswith("ray ")]
    stop = "ray job stop --no-wait --address=http://127.0.0.1:8265 opd-ray-first-x"
    assert asked == ([stop] if stops else [])


class _Metadata(BaseHTTPRequestHandler):
    """A machine's metadata server, of which the cloud takes the machine back at the third question."""

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token" and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self._answer("a-token")

    def do_GET(self) -> None:
        self.server.asked += 1
        announced = self.server.asked >= 3
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a-token"
            at = datetime.now(UTC) + timedelta(seconds=120)
            self._answer(json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}) if announced else None)
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer("TRUE" if announced else "FALSE")

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _spot_notice(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """node/spot-notice on a machine with a raylet, whose cloud says so at the third question."""
    loader = importlib.machinery.SourceFileLoader("spot_notice", str(NODE / "spot-notice"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("spot_notice", loader))
    loader.exec_module(module)
    for pid, words in ((1, ["bash"]), (7, ["/x/raylet", "--node_id=ab12", "--gcs-address=10.0.0.1:6379", "-v"])):
        (home / f"proc/{pid}").mkdir(parents=True)
        (home / f"proc/{pid}/cmdline").write_text("\0".join(words) + "\0")
    server = HTTPServer(("127.0.0.1", 0), _Metadata)
    server.asked = 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    named = {"METADATA": f"http://127.0.0.1:{server.server_port}", "PROCESSES": home / "proc", "RAY": home / "bin/ray"}
    for name, value in {**named, "POLL_S": 0.01}.items():
        monkeypatch.setattr(module, name, value)
    try:
        yield module
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", range(110, 121)), ("gcp", range(30, 31))])
def test_a_spot_notice_of_the_cloud_is_passed_on_to_ray(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cloud: str, seconds: range
) -> None:
    """The first call of Ray's fails, and is made again."""
    _program(home, "ray", f"[[ $RAY_AUTH_MODE == token ]] || exit 1; mkdir {home}/asked 2>/dev/null && exit 1; exit 0")
    with _spot_notice(home, monkeypatch) as module:
        module.watch(getattr(module, cloud))
    refused, called = (home / "calls").read_text().splitlines()
    said, _, left = called.rpartition("=")
    assert said == (
        "ray drain-node --address=10.0.0.1:6379 --node-id=ab12 --reason=DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message=spot notice --deadline-remaining-seconds"
    )
    assert int(left) in seconds and refused.startswith(said)
    assert "Ray knows" in capsys.readouterr().out


def test_a_spot_notice_waits_where_no_ray_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(home, "ray")
    with _spot_notice(home, monkeypatch) as module:
        (home / "proc/7/cmdline").write_text("")
        assert module.raylet() == {}
        watching = threading.Thread(target=module.watch, args=(module.gcp,), daemon=True)
        watching.start()
        watching.join(0.2)
        assert watching.is_alive() and not (home / "calls").exists()
        (home / "proc/7/cmdline").write_text("raylet\0--node_id=cd\0--gcs-address=10.0.0.1:6379")
        watching.join(30)
        assert not watching.is_alive() and "--node-id=cd" in (home / "calls").read_text()
