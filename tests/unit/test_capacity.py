"""How large a cluster may become, from the configuration of its autoscaler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay import node_provider

from opd_ray.placement import capacity
from opd_ray.placement.capacity import Limits, limits_of, most

MANIFEST = Path(__file__).parents[2] / "cluster" / "kuberay-cluster.yaml"

CLUSTER = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}},
        "learner": {"resources": {"CPU": 32, "GPU": 8, "learner_node": 1}, "max_workers": 1},
        "generator": {"resources": {"CPU": 16, "GPU": 1, "generator_node": 1}},
        "unknown": {"node_config": {}, "max_workers": 2},
    },
}


def test_a_node_type_without_a_limit_has_the_cluster_s_and_the_head_has_none() -> None:
    limits = limits_of(CLUSTER)
    assert limits.max_workers == 5
    assert [number for _, number in limits.node_types] == [0, 1, 5, 2]


def test_each_resource_is_counted_on_the_nodes_that_have_most_of_it() -> None:
    found = most(limits_of(CLUSTER))
    assert found == {"CPU": 32 + 4 * 16, "GPU": 8 + 4, "learner_node": 1, "generator_node": 5}


def test_only_nodes_with_the_asked_resource_count() -> None:
    assert most(limits_of(CLUSTER), "generator_node") == {"CPU": 80, "GPU": 5, "generator_node": 5}
    assert most(limits_of(CLUSTER), "misspelt_node") == {}


def test_no_more_nodes_than_the_whole_cluster_may_have() -> None:
    assert most(Limits(2, (({"GPU": 8}, 9),))) == {"GPU": 16}


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Path]:
    """A process that was started as Ray's autoscaler for the Ray at 203.0.113.1:6379; the file that it was given."""
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(CLUSTER, sort_keys=False))
    command = [sys.executable, "-c", "input()", "--gcs-address=203.0.113.1:6379", f"--autoscaling-config={config}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield config
    process.communicate(b"\n")


def test_limits_are_read_from_the_file_of_the_autoscaler_that_serves_this_ray(monitor: Path) -> None:
    assert capacity._read_file("203.0.113.1:6379") == limits_of(CLUSTER)
    assert capacity._read_file("203.0.113.2:6379") is None


def test_a_file_that_is_gone_is_no_limit(monitor: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor.unlink()
    assert capacity._read_file("203.0.113.1:6379") is None
    assert str(monitor) in caplog.text


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The RayCluster of cluster/, as the Kubernetes API returns it to a pod of it."""
    namespace = tmp_path / "namespace"
    namespace.write_text("research")
    monkeypatch.setattr(capacity, "_NAMESPACE_FILE", namespace)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "opd-ray")
    (cluster,) = (each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "RayCluster")
    cluster["metadata"]["namespace"] = "research"

    def get(client: node_provider.KubernetesHttpApiClient, path: str) -> dict[str, Any]:
        assert (client._namespace, path) == ("research", "rayclusters/opd-ray")
        return cluster

    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    return cluster


def test_on_kubernetes_the_limits_are_those_of_the_ray_cluster(pod: dict[str, Any]) -> None:
    limits = capacity._read_kubernetes()
    assert limits is not None
    assert most(limits, "generator_node") | {"memory": 0} == {"CPU": 56, "GPU": 8, "generator_node": 8, "memory": 0}
    assert most(limits)["GPU"] == 4 + 4 + 8


def test_on_kubernetes_without_autoscaling_there_are_no_limits(pod: dict[str, Any]) -> None:
    pod["spec"]["enableInTreeAutoscaling"] = False
    assert capacity._read_kubernetes() is None


def test_on_kubernetes_an_api_that_cannot_be_read_is_said(
    pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def get(*_: object) -> dict[str, Any]:
        raise FileNotFoundError("no token")

    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    assert capacity._read_kubernetes() is None
    assert "opd-ray" in caplog.text and "no token" in caplog.text
