"""Which Ray a run joins, and what it says of one that it cannot join."""

from __future__ import annotations

import socket

import pytest

from opd_ray.errors import InputError
from opd_ray.placement.session import cluster


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_at_which_nobody_answers_is_refused_at_once(monkeypatch, free_port):
    """The bug: Ray tried it again and again for minutes, and then came a traceback."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    match = rf"RAY_ADDRESS=127.0.0.1:{free_port}: nobody answers there .*; start a head"
    with pytest.raises(InputError, match=match), cluster():
        pytest.fail("joined a cluster that is not there")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "localhost", "host:port"])
def test_an_address_of_another_kind_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    match = f"RAY_ADDRESS={address} is no HOST:PORT, .* hand the run in at its dashboard"
    with pytest.raises(InputError, match=match), cluster():
        pytest.fail("joined a cluster in another way")
