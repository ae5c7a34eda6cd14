"""The nodes of a cluster one by one: what each has, and functions that run on each of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import ray
from ray import ObjectRef
from ray._private import state  # ray.util.state asks the dashboard, which a cluster may lack
from ray._private.utils import estimate_available_memory, resolve_object_store_memory
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NVIDIA_SMI_S = 20.0
_T = TypeVar("_T")


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
    """Infinite where it tells none, of a chip that shares its host's."""
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


def places_of(actors: Sequence[ActorHandle]) -> list[str | None]:
    """Host name and address of the node on which each actor starts or runs; None where it has none yet."""
    names = {node.id: node.name for node in nodes()}
    return [names.get(_node_id(actor)) for actor in actors]


def _node_id(actor: ActorHandle) -> str | None:
    place = state.actors(actor._actor_id.hex()).get("Address", {})
    return place["NodeID"] if place.get("Port") else None  # before, it is only the one that looks for a place


def this_machine() -> Node:
    """As a Ray of the run's own would find it, by Ray's own reckoning."""
    free = float(estimate_available_memory())
    store = float(resolve_object_store_memory(int(free)))
    return Node("", "this machine", float(psutil.cpu_count()), float(len(cards())), free - store, store)


def cards() -> list[Card]:
    """The GPUs of this machine; empty where it has none. Does not touch them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return [Card(name, _bytes(mebibytes), driver) for name, mebibytes, driver in rows]


def _bytes(mebibytes: str) -> float:
    try:
        return float(mebibytes) * 2**20
    except ValueError:  # "[N/A]"
        return float("inf")


def on_each(places: Sequence[Node], function: Callable[..., Any], *args: Any, deadline_s: float) -> list[Any]:
    """What ``function(*args)`` returns on each node, in their order; an exception where it failed there or gave no
    answer within ``deadline_s``, which all of them share."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = dict(enumerate(task.options(scheduling_strategy=pinned(node)).remote(*args) for node in places))
    found = answers(refs, deadline_s)
    for number, ref in refs.items():
        if isinstance(found[number], TimeoutError):
            ray.cancel(ref, force=True)
    return list(found.values())


def answers(refs: Mapping[_T, ObjectRef], deadline_s: float) -> dict[_T, Any]:
    """What each ref comes to by a deadline that all of them share: a value, or an exception."""
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=deadline_s)
    found: dict[_T, Any] = {}
    for name, ref in refs.items():
        try:
            found[name] = ray.get(ref, timeout=0)
        except GetTimeoutError:
            found[name] = TimeoutError(f"no answer within {deadline_s:g} s")
        except RayError as error:
            found[name] = getattr(error, "cause", None) or error
    return found


def ends_of(actors: Sequence[ActorHandle]) -> list[float | None]:
    """For each actor in how many seconds its node goes, where that is announced (a spot notice, a pod that is told to
    end, `ray drain-node`), infinitely many where no time is said; None where the node stays. Blocks.

    Ray places nothing new on such a node. Ray Data asks in the same way.
    """
    announced = state.state.get_draining_nodes()  # to milliseconds since 1970, or 0
    if not announced:
        return [None] * len(actors)
    now = time.time()
    left = {node: at / 1000 - now if at else float("inf") for node, at in announced.items()}
    return [left.get(_node_id(actor)) for actor in actors]


def pinned(node: Node) -> NodeAffinitySchedulingStrategy:
    """On this node or nowhere."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)
