"""Has the cluster room for what a run asks for?

How many nodes an autoscaler may still start is known to it alone. Where there is one, what does not fit is not refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import psutil
import ray

from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.placement.wanted import Wanted

_HEAD = "node:__internal_head__"
"""Resource that Ray gives the head node, and only that."""
_ASK_HEAD_S = 60.0


def check_fits(check: Callable[..., None], asked: Config | Wanted) -> None:
    """Raises InputError where ``check(asked, cluster_capacity)`` does, one of :mod:`opd_ray.run.preflight`'s. On a
    cluster that may grow the refusal is only said: rooms that get no nodes end the run by ``deadlines.start_s``."""
    try:
        check(asked, cluster_capacity)
    except InputError as refusal:
        if not may_grow():
            raise
        print(f"{refusal}; not refused, since the cluster's autoscaler may add nodes", flush=True)


def cluster_capacity(node_resource: str | None = None) -> dict[str, float]:
    """Resource to what all nodes of the connected cluster have of it; of those with the custom ``node_resource``."""
    total: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"] and (node_resource is None or node["Resources"].get(node_resource)):
            total.update(node["Resources"])
    return total


def may_grow() -> bool:
    """Does an autoscaler look after the cluster? The head node knows."""
    try:
        ask = ray.remote(_has_autoscaler).options(num_cpus=0, resources={_HEAD: 0.001})
        return ray.get(ask.remote(), timeout=_ASK_HEAD_S)
    except ray.exceptions.RayError:
        return False


def _has_autoscaler() -> bool:
    """On the head node. KubeRay's stands in a container of its own, so that every cluster of KubeRay may have one; any
    other is a process here, which was given this Ray's address and a configuration."""
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    commands = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    return "RAY_CLUSTER_NAME" in os.environ or any(
        address in command and any(argument.startswith("--autoscaling-config=") for argument in command)
        for command in commands
    )
