"""An autoscaling cluster on this machine: nodes come on demand and go when idle, and a job knows that more may come.

pytest.mark.ray: every node is a real one of Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from autoscaling_head import AutoscalingHead, autoscaling_head

pytestmark = pytest.mark.ray
LOCAL = Path(__file__).parents[2] / "cluster" / "local.yaml"

_DRIVER = """
import json, time
import ray
from opd_ray.placement.capacity import cluster_capacity, may_grow

ray.init(log_to_driver=False, logging_level="ERROR")

class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()

    def may_grow(self):
        return may_grow()

def wait_until(number):
    while sum(node["Alive"] for node in ray.nodes()) != number:
        time.sleep(0.1)

before = cluster_capacity()
actor = ray.remote(Where)
on_generator = actor.options(num_cpus=0.5, resources={"generator_node": 0.001}).remote()
others = [actor.options(num_cpus=0.5).remote() for _ in range(2)]
home = ray.get_runtime_context().get_node_id()
result = {
    "before": before,
    "may_grow": may_grow(),
    "others_at_home": all(node == home for node in ray.get([other.node.remote() for other in others])),
    "generator_at_home": ray.get(on_generator.node.remote(), timeout=60) == home,
    "with_node": cluster_capacity(),
    "generators": cluster_capacity("generator_node"),
    "may_grow_from_node": ray.get(on_generator.may_grow.remote()),
}
ray.kill(on_generator)
wait_until(1)
print(json.dumps(result))
"""


_JOBS = """
import os, subprocess, sys, time
from pathlib import Path
from ray.job_submission import JobSubmissionClient

directory, node, head = Path({directory!r}), Path({node!r}), {head!r}

def wait(what):
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)

def connected():
    global client
    try:
        client = JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"])
        return client.list_jobs() is not None
    except (ConnectionError, RuntimeError):
        return False

def submit(program):
    variables = {{"RAY_API_SERVER_ADDRESS": os.environ["RAY_API_SERVER_ADDRESS"]}}
    command = f"{{node}}/job {{sys.executable}} {{directory}}/{{program}}.py"
    return client.submit_job(entrypoint=command, runtime_env={{"env_vars": variables}})

wait(connected)
refused, running = submit("refused"), submit("running")
wait(lambda: client.get_job_status(refused).is_terminal() and (directory / "runs").exists())
subprocess.run([sys.executable, node / "pre-stop", head], check=True, timeout=60)
assert (directory / "saved").exists()
wait(lambda: client.get_job_status(running).is_terminal())
print(client.get_job_status(refused), client.get_job_status(running), client.get_job_info(running).driver_exit_code)
"""
_RUNNING = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1)
    Path(__file__).with_name("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path(__file__).with_name("runs").touch()
time.sleep(100)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    """Of the cluster that cluster/local.yaml describes, with less patience for idle nodes."""
    cluster = yaml.safe_load(LOCAL.read_text()) | {"idle_timeout_minutes": 2 / 60}
    with autoscaling_head(cluster, dashboard=True) as head:
        yield head


def test_an_actor_brings_a_node_up_its_end_lets_it_go_and_capacity_counts_both(head: AutoscalingHead) -> None:
    result = json.loads(head.run(_DRIVER).splitlines()[-1])
    assert len(head.raylets()) == 1
    assert result["others_at_home"] and not result["generator_at_home"]
    assert result["may_grow"] and result["may_grow_from_node"]
    kinds = ("CPU", "learner_node", "teacher_node", "generator_node")
    held = {
        where: tuple(result[where].get(kind, 0) for kind in kinds) for where in ("before", "with_node", "generators")
    }
    assert held == {"before": (2, 1, 1, 0), "with_node": (3, 1, 1, 1), "generators": (1, 0, 0, 1)}


def test_before_the_heads_pod_ends_its_jobs_save_and_what_was_refused_is_not_tried_again(
    head: AutoscalingHead, tmp_path: Path
) -> None:
    """cluster/node in a pod's place: KubeRay tries again what FAILED, on a new cluster, and leaves what was STOPPED."""
    (tmp_path / "refused.py").write_text("raise SystemExit(2)")
    (tmp_path / "running.py").write_text(_RUNNING)
    (raylet,) = head.raylets().values()
    places = {"directory": str(tmp_path), "node": str(LOCAL.parent / "node"), "head": str(raylet.ppid())}
    assert head.run(_JOBS.format(**places)).splitlines()[-1] == "STOPPED FAILED 143"
