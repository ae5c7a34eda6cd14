"""A Ray of this machine without the processes that no test asks: the dashboard's server, of which Ray starts a part
also where there is to be none, Ray Client's, and the one that brings what workers print to drivers.

    with bare_ray(runtime_env):
        actor.remote()

Each takes one to two seconds of CPU to start, and the last one reads every log for as long as the Ray is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import ray
from ray._private.node import Node


@contextlib.contextmanager
def bare_ray(runtime_env: dict[str, Any], **options: Any) -> Iterator[None]:
    """With more logical CPUs than the machine has; ``options`` are further ones of ray.init."""
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    with without_servers():
        ray.init("local", num_cpus=8, runtime_env=runtime_env, **quiet, **options)
    yield
    ray.shutdown()


@contextlib.contextmanager
def without_servers() -> Iterator[None]:
    """Nodes that are started meanwhile lack them."""

    def no_api_server(node: Node, **_: Any) -> None:
        node._webui_url = ""

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(Node, "start_api_server", no_api_server))
        for name in ("start_log_monitor", "start_ray_client_server"):
            patches.enter_context(patch.object(Node, name))
        yield
