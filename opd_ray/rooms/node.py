"""Where this process runs."""

from __future__ import annotations

import socket

import ray


def this_node() -> str:
    """Host name and address of the Ray node this runs on, for error messages."""
    return f"{socket.gethostname()} ({node_ip()})"


def this_actor() -> str:
    """The name of the actor that this is; empty outside of one."""
    return (ray.get_runtime_context().get_actor_name() or "") if ray.is_initialized() else ""


def node_ip() -> str:
    """The address under which other nodes reach this one."""
    return ray.util.get_node_ip_address()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
