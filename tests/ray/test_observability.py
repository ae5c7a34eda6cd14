"""What a run lets be seen from outside: metrics on Ray's port, and log lines of its workers."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import exported_metrics
from opd_ray import config as configs
from opd_ray.learn.losses.diagnostics import RATIOS
from opd_ray.rooms import logs
from opd_ray.run.train import train
from opd_ray.watch.metrics import port_name

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

OPTIONS = [
    "rollout.engine=torch",
    "rollout.max_response_tokens=24",
    "rollout.max_num_seqs=16",
    "buffer.prompts_per_step=8",
    "learner.steps=3",
    "evaluation.num_problems=16",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=2",
]
SELDOM = {f"ray_{port_name(f'learner/{name}')}" for name in (*RATIOS, "advantage_other")}
"""Means over some of the tokens, which a step without such tokens leaves out."""


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """As a run starts it: workers log JSON."""
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        job_config=logs.job_config(),
    )
    yield
    ray.shutdown()


def port() -> str:
    """What Prometheus would read."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        return answer.read().decode()


def test_every_query_names_metrics_that_a_run_exports(world, ray_here, tmp_path):
    run_dir = tmp_path / "runs" / "a"
    train(configs.load(None, [*world.overrides(), *OPTIONS]), run_dir)
    # Ray exports every ten seconds, and keeps what a run set last for twenty.
    deadline = time.monotonic() + 30
    last = [re.compile(rf"^ray_opd_{name}_step{{.*}} 3\.0$", re.MULTILINE) for name in ("run", "checkpoint")]
    while not all(each.search(text := port()) for each in last):
        assert time.monotonic() < deadline, "the last step and its checkpoint never came to the metrics port"
        time.sleep(1)
    lines = [line for line in text.splitlines() if line.startswith("ray_opd_")]
    assert all('run="runs/a"' in line for line in lines)
    names = {line.partition("{")[0] for line in lines} | SELDOM
    missing = {
        pattern.pattern: where
        for where, query in exported_metrics.queries().items()
        for pattern in exported_metrics.names(query)
        if not any(pattern.fullmatch(name) for name in names)
    }
    assert missing == {}


def test_a_worker_s_log_line_names_actor_room_node_step_and_version(ray_here):
    """JSON in Ray's log directory, which `ray logs` reads."""

    class Worker:
        async def work(self) -> str:
            logs.at(version=4)
            logs.get("opd_ray.generate.generator").info("weights received", extra={"step": 5})
            return ray.get_runtime_context().get_worker_id()

    options = {"name": "student-generator-7", "runtime_env": {"env_vars": {logs.ROOM_VARIABLE: "generate"}}}
    worker = ray.remote(Worker).options(num_cpus=0, **options).remote()
    worker_id = ray.get(worker.work.remote())
    directory = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    [file] = directory.glob(f"worker-{worker_id}-*.err")
    [line] = [json.loads(each) for each in file.read_text().splitlines() if each.startswith("{")]
    expected = {
        "levelname": "INFO",
        "name": "opd_ray.generate.generator",
        "message": "weights received",
        "actor_name": "student-generator-7",
        "room": "generate",
        "step": 5,
        "version": 4,
        "job_id": ray.get_runtime_context().get_job_id(),
        "node_id": ray.get_runtime_context().get_node_id(),
    }
    assert {key: line.get(key) for key in expected} == expected
    assert line["node"] and line["asctime"]
    ray.kill(worker)
