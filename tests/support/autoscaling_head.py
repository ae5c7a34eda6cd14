"""A Ray head with the fake autoscaler: nodes of this machine that come on demand and go when idle.

    generator = NodeType({"CPU": 1, "generator_node": 1}, maximum=2)
    with autoscaling_head(fake_cluster({"generator": generator}, head={"CPU": 2})) as head:
        subprocess.run([sys.executable, "driver.py"], env=head.environment)

Every node is a raylet of this machine, started and ended by Ray's own autoscaler as on a cloud. The head has ports,
a directory and a token of its own, and everything that it started ends with the block.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

import worker_setup
from opd_ray.rooms.node import free_port

_MARK = "OPD_RAY_TEST_HEAD"
"""Variable that everything the head starts inherits, also where its parent is gone."""
_HEAD_TYPE = "ray.head.default"  # the name that the fake provider knows
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_HEAD_ID = "f" * 51 + "00000"
_LISTS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
_RAY = f"""
import contextlib, sys
sys.path.append({str(Path(__file__).parent)!r})
from bare_ray import without_servers
from ray._private import ray_constants
from ray.scripts import scripts
ray_constants.SETUP_WORKER_FILENAME = {worker_setup.__file__!r}
with contextlib.nullcontext() if "--include-dashboard=true" in sys.argv else without_servers():
    scripts.main()
"""
_DEADLINE_S = 90.0
_POLL_S = 0.2
_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class NodeType:
    """One kind of node that the autoscaler may start."""

    resources: Mapping[str, float]
    minimum: int = 0
    maximum: int = 1


@dataclass(frozen=True)
class AutoscalingHead:
    """A head that runs."""

    address: str
    """host:port of its GCS; already RAY_ADDRESS in ``environment``."""
    environment: dict[str, str]
    """For a driver's process: address and token."""
    temp_dir: Path
    """Sessions, logs and the autoscaler's configuration; gone after the block."""
    process: subprocess.Popen[bytes]
    log: Path
    """What it says."""

    def check(self) -> None:
        """Raises RuntimeError with the end of its log where it has ended: nothing else says so."""
        if (code := self.process.poll()) is not None:
            raise RuntimeError(f"the Ray head has ended, with {code}; {_tail(self.log)}")

    def run(self, code: str, *, timeout_s: float = 120.0) -> str:
        """What Python code prints that runs as a driver of this head. Raises RuntimeError if it fails."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=self.environment, timeout=timeout_s, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the driver ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout

    def raylets(self) -> dict[str, psutil.Process]:
        """Node id in hex to the raylet of each node that runs, the head's included."""
        found = {}
        for process in _started(self.temp_dir):
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    arguments = dict(each.lstrip("-").partition("=")[::2] for each in process.cmdline())
                    if node := arguments.get("node_id"):  # one that has just ended has no arguments left
                        found[node] = process
        return found

    def kill_node(self, node_id: str) -> None:
        """Ends a node at once, with every worker on it, as a machine that is switched off."""
        raylet = self.raylets()[node_id]
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def drain_node(self, node_id: str, seconds: int) -> None:
        """Announces that a node goes in so many seconds, as whoever hears of a spot machine's end would."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice")
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
            + [f"--node-id={node_id}", *reason, f"--deadline-remaining-seconds={seconds}"],
            env=self.environment,
            timeout=_DEADLINE_S,
            check=True,
        )


def fake_cluster(
    node_types: Mapping[str, NodeType], *, head: Mapping[str, float], idle_timeout_s: float = 5.0
) -> dict[str, Any]:
    """The configuration of a cluster whose head has the resources ``head`` and that may start ``node_types``."""
    return {
        "cluster_name": "test",
        "max_workers": sum(kind.maximum for kind in node_types.values()),
        "idle_timeout_minutes": idle_timeout_s / 60,
        "upscaling_speed": 100.0,
        "provider": {"type": "external", "module": _PROVIDER, "launch_multiple": True},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": dict(head), "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": dict(kind.resources),
                    "node_config": {},
                    "min_workers": kind.minimum,
                    "max_workers": kind.maximum,
                }
                for name, kind in node_types.items()
            },
        },
        # Ray has defaults for these, but not for an external provider.
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in _LISTS},
    }


@contextlib.contextmanager
def autoscaling_head(cluster: Mapping[str, Any], *, dashboard: bool = False) -> Iterator[AutoscalingHead]:
    """Starts the head of ``cluster``, whose provider is the fake one; its autoscaler starts the other nodes.

    Raises RuntimeError with the end of its log when it does not come up.
    """
    # The directory's name must be short: Ray puts UNIX sockets in it, and their paths end at 107 characters.
    temp_dir = Path(tempfile.mkdtemp(prefix="opd-"))
    port, dashboard_port = free_port(), free_port()
    cluster = copy.deepcopy(dict(cluster))
    cluster["provider"] |= {"gcs_address": f"127.0.0.1:{port}", "head_node_id": _HEAD_ID}
    node_types = cluster["available_node_types"]
    head_resources = node_types[cluster["head_node_type"]]["resources"]
    for kind in node_types.values():
        kind["resources"].setdefault("object_store_memory", _STORE_BYTES)
    config = temp_dir / "cluster.yaml"
    config.write_text(yaml.safe_dump(cluster))
    environment = _environment(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}" if dashboard else None)
    log = temp_dir / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(temp_dir, config, port, dashboard_port, dashboard, head_resources),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt at the terminal reaches the head through this block's end
            env={name: value for name, value in environment.items() if name not in _ADDRESSES}
            | {
                _MARK: str(temp_dir),
                "RAY_FAKE_CLUSTER": "1",
                "RAY_prestart_worker_first_driver": "0",
                "RAY_enable_autoscaler_v2": "1",  # the one that `ray up` and KubeRay start
                "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
                "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "AUTOSCALER_METRIC_PORT": str(free_port()),
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            },
        )
    try:
        _wait(process, log)
        yield AutoscalingHead(f"127.0.0.1:{port}", environment, temp_dir, process, log)
    finally:
        _stop(process, temp_dir)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _command(
    temp_dir: Path, config: Path, port: int, dashboard_port: int, dashboard: bool, resources: Mapping[str, float]
) -> list[str]:
    standard = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory", "object_store_memory": "object-store-memory"}
    custom = {name: amount for name, amount in resources.items() if name not in standard}
    ports = {
        "port": port,
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,  # any free ones, instead of a fixed range that another Ray may use
        "max-worker-port": 0,
    }
    return [
        *(sys.executable, "-c", _RAY, "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temp_dir}"),
        *(f"--autoscaling-config={config}", f"--include-dashboard={str(dashboard).lower()}"),
        *(f"--{option}={resources.get(name, 0)}" for name, option in standard.items() if name != "memory"),
        f"--resources={json.dumps(custom)}",
        *(f"--{name}={number}" for name, number in ports.items()),
    ]


def _environment(address: str, dashboard: str | None) -> dict[str, str]:
    """This process's, with the cluster's addresses and a token that nobody else has."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_ADDRESS": address,
        **({"RAY_API_SERVER_ADDRESS": dashboard} if dashboard else {}),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the head's raylet is up."""
    deadline = time.monotonic() + _DEADLINE_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the Ray head did not start; {_tail(log)}")
        time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    return "its log ends with:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _started(temp_dir: Path) -> list[psutil.Process]:
    """Everything that carries the mark of this head."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(temp_dir):
                found.append(process)
    return found


def _stop(process: subprocess.Popen[bytes], temp_dir: Path) -> None:
    """Ends the head, and for certain what it and its autoscaler started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    while started := _started(temp_dir):
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(started, timeout=5)
    process.wait()
