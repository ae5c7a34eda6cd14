"""The nodes of a cluster one by one: what each has, and functions that run on each of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NVIDIA_SMI_S = 20.0


@dataclass(frozen=True)
class Node:
    """One node, alive."""

    id: str
    """Ray's; empty where there is no Ray."""
    name: str
    """Host name and address."""
    cpus: float
    gpus: float
    memory_bytes: float
    """For processes, the object store left out."""
    store_bytes: float
    """Of the object store."""
    resources: frozenset[str] = frozenset()
    """Names of all that it has, custom ones included."""


@dataclass(frozen=True)
class Card:
    """One GPU, as nvidia-smi has it."""

    name: str
    memory_bytes: float
    driver: str


def nodes() -> list[Node]:
    """Those of the connected cluster; the order is that of their names."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            cpus, gpus = (there.get(kind, 0.0) for kind in ("CPU", "GPU"))
            memory, store = (there.get(kind, 0.0) for kind in ("memory", "object_store_memory"))
            found.append(Node(node["NodeID"], name, cpus, gpus, memory, store, frozenset(there)))
    return sorted(found, key=lambda node: (node.name, node.id))


def this_machine() -> Node:
    """As a Ray of the run's own would find it: three tenths of the free memory, as far as /dev/shm has it, for the
    object store (ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION)."""
    free = psutil.virtual_memory().available
    store = 0.3 * free
    if psutil.LINUX:
        store = min(store, 0.95 * psutil.disk_usage("/dev/shm").free)
    return Node("", "this machine", float(psutil.cpu_count()), float(len(cards())), free - store, store)


def cards() -> list[Card]:
    """The GPUs of this machine; empty where it has none. Does not touch them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return [Card(name, float(mebibytes) * 2**20, driver) for name, mebibytes, driver in rows]


def on_each(places: Sequence[Node], function: Callable[..., Any], *args: Any, deadline_s: float) -> list[Any]:
    """What ``function(*args)`` returns on each node, in their order; an exception where it failed there or gave no
    answer within ``deadline_s``, which all of them share."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = [task.options(scheduling_strategy=pinned(node)).remote(*args) for node in places]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=deadline_s)
    done, answers = set(ready), []
    for ref in refs:
        if ref not in done:
            ray.cancel(ref, force=True)
            answers.append(TimeoutError(f"no answer within {deadline_s:g} s"))
            continue
        try:
            answers.append(ray.get(ref, timeout=deadline_s))
        except (RayError, GetTimeoutError) as error:
            answers.append(getattr(error, "cause", None) or error)
    return answers


def pinned(node: Node) -> NodeAffinitySchedulingStrategy:
    """On this node or nowhere."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)
