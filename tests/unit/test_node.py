"""Which network the libraries of a node are told to use."""

from __future__ import annotations

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
    interfaces = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth1": "10.0.0.7", "eth10": "10.0.0.70"}
    found = {name: [SimpleNamespace(address="fe80::1"), SimpleNamespace(address=it)] for name, it in interfaces.items()}
    monkeypatch.setattr(node.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(node, "node_ip", lambda: address)
    assert node.interface_variables() == expected
