"""Which network the libraries of a node are told to use."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_ray.rooms import node


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.7", {"NCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": "eth1"}),
        ("10.9.9.9", {}),  # behind a translation of addresses no interface has the one that others know
    ],
)
def test_nccl_and_gloo_use_the_interface_of_the_nodes_address(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: dict[str, str]
) -> None:
    """Left alone NCCL took docker0, and a rank on another node waited for it until its deadline."""
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    interfaces = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth1": "10.0.0.7", "eth10": "10.0.0.70"}
    found = {name: [SimpleNamespace(address="fe80::1"), SimpleNamespace(address=it)] for name, it in interfaces.items()}
    monkeypatch.setattr(node.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(node, "node_ip", lambda: address)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    node.use_own_interface()
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    node.use_own_interface()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "what the user says stays"


def test_a_free_port_is_none_that_connections_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: between the look and its use some other process's connection had the port."""
    first = int(node._PORTS_OF_CONNECTIONS.read_text().split()[0])
    if first > 20_000:
        assert all(20_000 <= node.free_port() < min(30_000, first) for _ in range(50))
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(node, "_PORTS_OF_CONNECTIONS", tmp_path / "range")
    assert node.free_port() > 0
    monkeypatch.setattr(node, "_PORTS_OF_CONNECTIONS", tmp_path / "not there")
    assert node.free_port() > 0


def test_a_port_that_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setattr(node, "_FIRST_PORT", taken.getsockname()[1])
        monkeypatch.setattr(node, "_NUM_PORTS", 1)
        assert node.free_port() != taken.getsockname()[1]
