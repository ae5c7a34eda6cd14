"""Where a run keeps its snapshots: in Ray's object store where the nodes have the room, else on disk alone. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from opd_ray.config import Config, LearnerConfig
from opd_ray.plan.fit import gigabytes
from opd_ray.plan.outlook import outlook

if TYPE_CHECKING:
    from opd_ray.placement.nodes import Node
    from opd_ray.run.preflight import Preflight


def with_room(config: Config, facts: Preflight, there: Sequence[Node]) -> tuple[Config, str | None]:
    """The configuration that the run can have on these nodes, and what is to be said about it.

    A rank's part of a snapshot lies in the store of its node, the newest beside the one that takes its place, 12 bytes
    for each parameter that is trained; rollouts and scores may all lie there, too. Nodes that an autoscaler has not
    started yet are not known: nothing is changed for their sake.
    """
    hosts = list(_hosts(config.learner, there))
    if not hosts or not config.checkpoint.memory_every_steps:
        return config, None
    store = outlook(config, facts).store_bytes
    for node, ranks in hosts:
        snapshots = store["snapshots"] * ranks / config.learner.num_ranks
        if snapshots + store["rollouts and scores"] > node.store_bytes:
            return _on_disk(config), _sentence(config, node, snapshots, store["rollouts and scores"])
    return config, None


def _hosts(learner: LearnerConfig, there: Sequence[Node]) -> Iterator[tuple[Node, int]]:
    """Nodes that may host ranks, and the most of them that each may be given."""
    able: list[tuple[Node, int]] = []
    for node in there:
        if learner.node_resource and learner.node_resource not in node.resources:
            continue
        limits = [learner.num_ranks]
        for has, each in ((node.gpus, learner.gpus_per_rank), (node.cpus, learner.cpus_per_rank)):
            limits += [int(has / each + 1e-6)] if each else []
        if min(limits):
            able.append((node, min(limits)))
    level = learner.num_ranks
    if learner.placement == "spread":  # evenly over those, as far as they go
        enough = (most for most in range(1, level) if sum(min(most, ranks) for _, ranks in able) >= level)
        level = next(enough, level)
    for node, ranks in able:
        yield node, min(level, ranks)


def _on_disk(config: Config) -> Config:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, memory_every_steps=0))


def _sentence(config: Config, node: Node, snapshots: float, rollouts: float) -> str:
    every = config.checkpoint.every_steps
    instead = f"they are on disk alone, every {every} steps" if every else "there are none, as checkpoint.every_steps=0"
    return (
        f"snapshots: in memory they would take {gigabytes(snapshots)}, beside {gigabytes(rollouts)} of rollouts, but "
        f"the object store of {node.name} has {gigabytes(node.store_bytes)}: {instead}; give Ray more (ray start "
        "--object-store-memory) to have them in memory"
    )
