"""How large the cluster can become: what it has, or what its autoscaler may add to that.

Open-source Ray keeps the autoscaler's limits from everyone but the autoscaler. They are read where it reads them: the
file that its process on the head node was started with, or, under KubeRay, the RayCluster in the Kubernetes API.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

_HEAD = "node:__internal_head__"
"""Resource that Ray gives the head node, and only that."""
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_ASK_HEAD_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What an autoscaler may start."""

    max_workers: int
    """Nodes besides the head."""
    node_types: tuple[tuple[Mapping[str, float], int], ...] = field(default=())
    """Resources of one node, and how many such nodes there may be."""


def cluster_capacity(node_resource: str | None = None) -> dict[str, float]:
    """Resource to the most of it that the connected cluster has or may grow to.

    With ``node_resource``, only nodes that have that custom resource are counted. Resources of node types that the
    autoscaler's configuration does not tell (on-premises clusters) count when the nodes are there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counted = [node for node in nodes if node_resource is None or node.get(node_resource)]
    present = _total(counted)
    limits = _ask_head()
    if limits is None:
        return present
    head = _total(node for node in counted if _HEAD in node)
    possible = most(limits, node_resource)
    names = {*present, *possible}
    return {name: max(present.get(name, 0.0), head.get(name, 0.0) + possible.get(name, 0.0)) for name in names}


def limits_of(cluster: Mapping[str, Any]) -> Limits:
    """Reads a configuration of Ray's cluster launcher, as the autoscaler does."""
    total = int(cluster.get("max_workers", 0))
    types = cluster.get("available_node_types", {})
    head = cluster.get("head_node_type")
    return Limits(
        total,
        tuple(
            (dict(kind.get("resources") or {}), int(kind.get("max_workers", 0 if name == head else total)))
            for name, kind in types.items()
        ),
    )


def most(limits: Limits, node_resource: str | None = None) -> dict[str, float]:
    """Resource to the most of it that workers within ``limits`` can have, each resource on its own."""
    types = [kind for kind in limits.node_types if node_resource is None or kind[0].get(node_resource)]
    found = {}
    for name in {name for resources, _ in types for name in resources}:
        left, amount = limits.max_workers, 0.0
        for resources, number in sorted(types, key=lambda kind: -kind[0].get(name, 0)):
            taken = min(left, number)
            left -= taken
            amount += taken * resources.get(name, 0)
        found[name] = float(amount)
    return found


def _total(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for resources in nodes:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _ask_head() -> Limits | None:
    """The limits as the head node knows them; None without an autoscaler."""
    here = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == here and _HEAD in node["Resources"] for node in ray.nodes()):
        return _read()
    try:
        return ray.get(ray.remote(_read).options(num_cpus=0, resources={_HEAD: 0.001}).remote(), timeout=_ASK_HEAD_S)
    except ray.exceptions.RayError as error:
        log.warning("the head node does not tell what its autoscaler may start: %s", " ".join(str(error).split()))
        return None


def _read() -> Limits | None:
    """On the head node."""
    return _read_file(ray.get_runtime_context().gcs_address) or _read_kubernetes()


def _read_file(gcs_address: str) -> Limits | None:
    """From the configuration of the autoscaler that serves the Ray at this address, if it runs on this machine."""
    for process in psutil.process_iter():
        try:
            arguments = dict(each.partition("=")[::2] for each in process.cmdline() if each.startswith("--"))
        except psutil.Error:
            continue
        path = arguments.get("--autoscaling-config")
        if path and arguments.get("--gcs-address") == gcs_address:
            try:
                return limits_of(yaml.safe_load(Path(path).expanduser().read_text()))
            except (OSError, yaml.YAMLError) as error:
                log.warning("the autoscaler's configuration %s cannot be read: %s", path, error)
    return None


def _read_kubernetes() -> Limits | None:
    """From the RayCluster that this pod belongs to, if KubeRay scales it."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not _NAMESPACE_FILE.is_file():
        return None
    import requests
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    try:
        cluster = node_provider.KubernetesHttpApiClient(_NAMESPACE_FILE.read_text().strip()).get(f"rayclusters/{name}")
    except (OSError, requests.RequestException) as error:
        log.warning("RayCluster %s cannot be read, so that its maximum is not known: %s", name, error)
        return None
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return None
    return limits_of(autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster))
