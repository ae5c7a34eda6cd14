"""`opd-ray train` in a process of its own, held after given steps until a test has seen what it waits for."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

GATES = {40: "grown", 52: "replaced", 60: "given back"}
"""Steps after which the run is held until the test has seen what it waits for; after those before, it goes on alone."""


class Gates:
    """Holds the run after the steps of GATES until a file is there, and then writes where actors are."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def on_step(self, report: Any) -> None:
        if name := GATES.get(report.step):
            while not (self._directory / name).exists():
                await asyncio.sleep(0.05)
            (self._directory / f"{name}.json").write_text(json.dumps(_places()))


def _places() -> dict[str, Any]:
    """The custom resources of each node, and the class and node of each actor that lives."""
    import ray
    from ray._private import state  # what the state API shows, without the dashboard that serves it

    actors = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
    custom = ("generator_node", "learner_node")
    return {
        "nodes": {
            node["NodeID"]: [name for name in custom if name in node["Resources"]]
            for node in ray.nodes()
            if node["Alive"]
        },
        "actors": [(actor["ActorClassName"], actor["Name"], actor["Address"]["NodeID"]) for actor in actors],
        "placement_groups": [list(group["bundles_to_node_id"].values()) for group in _placement_groups()],
    }


def _placement_groups() -> list[dict[str, Any]]:
    from ray.util import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def drive() -> None:
    """`opd-ray train`, with gates: directory, then overrides."""
    from opd_ray import config
    from opd_ray.run.train import train

    directory, *overrides = sys.argv[1:]
    train(config.load(None, overrides), Path(directory) / "run", observers=(Gates(Path(directory)),))
