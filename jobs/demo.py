"""`make demo`: the whole system on this machine, the way a cluster runs it.

    python jobs/demo.py [--run-dir DIR] [section.field=value ...]

Starts a Ray head of its own with its dashboard, submits jobs/stableopd.py to it as `ray job submit` does,
follows the job, prints before and after, and stops the head: this one, by its process id, never another Ray of
this machine. Exits with the job's code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from opd_ray import config as configs
from opd_ray.errors import InputError
from opd_ray.run.card import before_and_after
from opd_ray.run.upload import check_upload

_ROOT = Path(__file__).resolve().parent.parent
_HEAD_DEADLINE_S = 120.0
_JOB_STOP_S = 30.0
"""How long a job that is stopped may take: it saves a checkpoint first."""
_POLL_S = 0.5
_STEP_LINE = re.compile(r"step +(\d+)/(\d+) \| (.*)")

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, help="where results go; by default a new directory in runs/")
    parser.add_argument("--config", type=Path, help="YAML file of sections and fields")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    try:
        configs.load(arguments.config, arguments.overrides)
        check_upload(_ROOT)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    run_dir = (arguments.run_dir or _ROOT / "runs" / f"demo-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    job = ["python", "jobs/stableopd.py", "--run-dir", str(run_dir)]
    if arguments.config:
        job += ["--config", str(arguments.config.absolute())]
    for name in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal must not leave the head behind either
        signal.signal(name, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with ray_head() as client:
            exit_code = follow(client, shlex.join([*job, *arguments.overrides]))
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    if exit_code == 0:
        print_outcome(run_dir)
    return exit_code


@contextlib.contextmanager
def ray_head() -> Iterator[Any]:
    """A Ray head on free ports of this machine, as a job client; it ends with the block, whatever happens."""
    # The directory's name must be short: Ray puts UNIX sockets in it, and their paths end at 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="opd-")
    # A token of this head's own: command line and library then agree on authentication, and nobody else gets in.
    # Ray reads these when it is first imported, which is therefore done further down.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    # Ray then has the loopback address, as on macOS, and listens there alone; --node-ip-address=127.0.0.1 it takes for
    # the address of the network. (What session.cluster sets for a Ray without a head.)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Ray leaves out some directories by itself and warns of each; .rayignore names them, too.
    os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    from opd_ray.rooms.node import free_port

    port = free_port()
    console.print("starting a Ray head on this machine (about 10 s)")
    log = Path(temp_dir) / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            _head_command(temp_dir, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own group: Ctrl-C reaches the head through us, after the job has ended
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody waits for this node's work
                "RAY_JOB_STOP_WAIT_TIME_S": f"{_JOB_STOP_S:.0f}",
            },
        )
    try:
        client = _connect(head, f"http://127.0.0.1:{port}", log)
        console.print(f"dashboard: http://127.0.0.1:{port} (token, if it asks: {os.environ['RAY_AUTH_TOKEN']})")
        yield client
    finally:
        _stop(head)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _head_command(temp_dir: str, dashboard_port: int) -> list[str]:
    from opd_ray.rooms.node import free_port

    ports = {
        "port": free_port(),
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,  # any free ones, instead of a fixed range that another Ray may use
        "max-worker-port": 0,
    }
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", f"--temp-dir={temp_dir}"),
        f"--object-store-memory={512 * 2**20}",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]


def _connect(head: subprocess.Popen[bytes], address: str, log: Path) -> Any:
    """The job client, as soon as the dashboard answers."""
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every file that is uploaded or not
    deadline = time.monotonic() + _HEAD_DEADLINE_S
    while True:
        try:
            client = JobSubmissionClient(address)
            client.list_jobs()
            return client
        except (ConnectionError, RuntimeError) as error:
            if head.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise SystemExit(f"demo: the Ray head did not start ({error}); its log ends with:\n{tail}") from None
        time.sleep(_POLL_S)


def _stop(head: subprocess.Popen[bytes]) -> None:
    """Ends the head and everything it started: politely, and then for certain."""
    console.print("stopping the Ray head")
    try:
        started = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=20)
    _, alive = psutil.wait_procs(started, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if head.poll() is None:
        head.kill()
    psutil.wait_procs(alive, timeout=5)


def follow(client: Any, entrypoint: str) -> int:
    """Submits the job, shows what it prints until it ends, and returns its exit code."""
    console.print(f"submitting: {entrypoint}")
    job = client.submit_job(
        entrypoint=entrypoint,
        runtime_env={
            "working_dir": str(_ROOT),
            "env_vars": {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        },
    )
    with _Display() as display:
        try:
            _until_ended(client, job, display)
        except KeyboardInterrupt:
            client.stop_job(job)
            console.print("the job saves where it is and ends; Ctrl-C once more does not wait for it")
            _until_ended(client, job, display, time.monotonic() + _JOB_STOP_S)
            raise
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:
        console.print(f"the job ended as {info.status}: {info.message}")
    return info.driver_exit_code or 1


def _until_ended(client: Any, job: str, display: _Display, deadline: float = math.inf) -> None:
    """Shows what the job prints until it ends, or until ``deadline``."""
    ended = False
    while not ended and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        ended = client.get_job_status(job).is_terminal()  # before the log, so that its end is not missed
        display.show_log(client.get_job_logs(job), ended)


class _Display:
    """The job's lines as they come; on a terminal a progress bar stands in for the step lines."""

    def __init__(self) -> None:
        self._shown = 0
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
        )
        self._task = self._bar.add_task("train", total=None, visible=False, facts="")
        self._live: Live | None = Live(self._bar, console=console) if console.is_terminal else None

    def __enter__(self) -> _Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show_log(self, text: str, ended: bool) -> None:
        """What is new in the job's log; a line that is not whole waits for its end."""
        whole = len(text) if ended else text.rfind("\n") + 1
        self.show(text[self._shown : whole].splitlines())
        self._shown = max(self._shown, whole)

    def show(self, lines: list[str]) -> None:
        for line in lines:
            step = _STEP_LINE.match(line)
            if self._live and step:
                facts = step[3].replace(" | ", "  ")
                self._bar.update(self._task, completed=int(step[1]), total=int(step[2]), visible=True, facts=facts)
            else:
                console.print(line, markup=False)


def print_outcome(run_dir: Path) -> None:
    """Before and after, from summary.json."""
    summary = json.loads((run_dir / "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    console.print()
    if before and after:
        console.print(f"{summary['method']}, seed {summary['seed']}: {after['num_problems']} held-out problems")
        table = Table()
        table.add_column("")
        for name in ("before", "after"):
            table.add_column(name, justify="right")
        for row in before_and_after(summary):
            table.add_row(*row)
        console.print(table)
    console.print(
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, {summary['tokens_per_s']:,.0f} tokens/s, "
        f"highest truncation in training {summary['max_truncation_rate']:.2f}, "
        f"staleness {summary['staleness']['mean']:.1f} (max {summary['staleness']['max']:.0f})"
    )
    console.print(f"run directory: {run_dir}")
    console.print(f"curves: {Path(sys.executable).with_name('tensorboard')} --logdir {run_dir / 'tensorboard'}")


if __name__ == "__main__":
    sys.exit(main())
