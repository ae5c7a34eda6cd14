"""What a cluster has room for, and what is said where it may grow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from opd_ray.errors import InputError
from opd_ray.placement import capacity

ADDRESS = "203.0.113.1:6379"


def test_nodes_that_are_there_and_have_the_asked_resource_count(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 8.0, "learner_node": 1.0}},
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 1.0, "generator_node": 1.0}},
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 1.0, "generator_node": 1.0}},
        {"Alive": False, "Resources": {"CPU": 16.0, "GPU": 1.0, "generator_node": 1.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert capacity.cluster_capacity() == {"CPU": 64, "GPU": 10, "learner_node": 1, "generator_node": 2}
    assert capacity.cluster_capacity("generator_node") == {"CPU": 32, "GPU": 2, "generator_node": 2}
    assert capacity.cluster_capacity("misspelt_node") == {}


def refuse(*_: object) -> None:
    raise InputError("cluster: 8 CPUs asked, 2 there")


def test_what_does_not_fit_is_refused_where_nothing_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "may_grow", lambda: False)
    with pytest.raises(InputError, match="8 CPUs asked"):
        capacity.check_fits(refuse, None)


def test_what_does_not_fit_is_said_where_an_autoscaler_may_add_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capacity, "may_grow", lambda: True)
    capacity.check_fits(refuse, None)
    assert "8 CPUs asked, 2 there; not refused, since the cluster's autoscaler" in capsys.readouterr().out


@pytest.fixture
def monitor() -> Iterator[None]:
    """A process that was started as Ray's autoscaler for the Ray at ADDRESS."""
    command = [sys.executable, "-c", "input()", f"--gcs-address={ADDRESS}", "--autoscaling-config=cluster.yaml"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield
    process.communicate(b"\n")


@pytest.mark.parametrize(("address", "found"), [(ADDRESS, True), ("203.0.113.2:6379", False)])
def test_an_autoscaler_serves_the_ray_whose_address_it_was_given(
    monitor: None, monkeypatch: pytest.MonkeyPatch, address: str, found: bool
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    assert capacity._has_autoscaler() is found


def test_a_cluster_of_kuberay_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=ADDRESS))
    monkeypatch.setenv("RAY_CLUSTER_NAME", "opd-ray")
    assert capacity._has_autoscaler()
