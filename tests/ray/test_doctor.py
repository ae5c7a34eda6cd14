"""The doctor on a cluster of two nodes, which are real ones of Ray on this machine; with small models and torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from bare_ray import without_servers
from opd_ray import config as configs
from opd_ray.doctor.checks import Doctor
from opd_ray.doctor.inspector import Talker
from opd_ray.placement.nodes import cards, nodes, on_each
from opd_ray.run import doctor as examination

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(bool(cards()), reason="its two nodes have no GPUs, which the doctor would miss on this machine"),
]


@pytest.fixture(scope="module")
def two_nodes(preloaded_workers: dict[str, Any]) -> Iterator[None]:
    """A cluster, to which this process is connected."""
    cluster = Cluster()
    try:
        with without_servers():
            for _ in range(2):
                cluster.add_node(num_cpus=1, include_dashboard=False)
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        ray.init(cluster.address, runtime_env=preloaded_workers, **quiet)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def fail_on(node: str) -> str:
    if node_id() == node:
        raise ValueError("not here")
    return "done"


def test_a_function_runs_on_each_node_and_fails_alone(two_nodes: None) -> None:
    there = nodes()
    assert on_each(there, node_id, deadline_s=60.0) == [node.id for node in there]
    assert len(there) == 2 and all(node.cpus == 1 and node.store_bytes > 0 for node in there)
    failed, done = on_each(there, fail_on, there[0].id, deadline_s=60.0)
    assert isinstance(failed, ValueError) and done == "done"


def test_two_nodes_are_found_fit(
    two_nodes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How fast they are is not asked: other tests run beside this one."""
    for floor in ("_LEAST_STORE_BYTES_PER_S", "_LEAST_DISK_BYTES_PER_S"):
        monkeypatch.setattr(f"opd_ray.doctor.findings.{floor}", 0.0)
    config = configs.load(None, ["rollout.engine=torch", f"checkpoint.directory={tmp_path}/elsewhere"])
    (tmp_path / "elsewhere").mkdir()
    well = examination.doctor(config, tmp_path / "runs" / "first")
    lines = capsys.readouterr().out.splitlines()
    begins = [line.partition(": ")[0] for line in lines]
    assert begins == [
        *("ok nodes", "ok driver", "ok packages", "ok clocks", "ok open files", "ok shared memory"),
        *("ok object store", "ok disk", "ok disk", "ok gloo broadcast", "ok engine", "ok teacher"),
    ], lines
    assert well
    assert "2 of 2 answer" in lines[0] and "between 1 pairs" in lines[-3] and "all 2 nodes" in lines[-2]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and not os.listdir(tmp_path / "elsewhere")


def test_a_broadcast_that_cannot_meet_names_its_nodes(two_nodes: None, tmp_path: Path, monkeypatch) -> None:
    """The adversary: a firewall, here an address of nobody's (TEST-NET-3)."""
    monkeypatch.setattr("opd_ray.doctor.checks._MEETING_S", 0.5)

    class Walled(Talker):
        def meeting_place(self) -> tuple[str, int]:
            return "203.0.113.1", super().meeting_place()[1]

    monkeypatch.setattr("opd_ray.doctor.checks.Talker", Walled)
    doctor = Doctor(configs.load(), tmp_path)
    doctor._bounded("nodes", 60.0, doctor._look)
    [finding] = doctor._bounded("gloo broadcast", 60.0, doctor._broadcast)
    first, second = doctor._nodes
    assert finding.check == "gloo broadcast" and finding.text.startswith(f"{first} and {second}: ")
    assert "open the ports between them" in finding.mend
