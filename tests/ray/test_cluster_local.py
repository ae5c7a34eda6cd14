"""An autoscaling cluster on this machine: nodes come on demand and go when idle, and a job knows that more may come.

pytest.mark.ray: every node is a real one of Ray.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from autoscaling_head import autoscaling_head

pytestmark = pytest.mark.ray
LOCAL = Path(__file__).parents[2] / "cluster" / "local.yaml"

_DRIVER = """
import json, time
import ray
from opd_ray.placement.capacity import cluster_capacity, may_grow

ray.init(log_to_driver=False, logging_level="ERROR")

class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()

    def may_grow(self):
        return may_grow()

def wait_until(number):
    while sum(node["Alive"] for node in ray.nodes()) != number:
        time.sleep(0.1)

before = cluster_capacity()
actor = ray.remote(Where)
on_generator = actor.options(num_cpus=0.5, resources={"generator_node": 0.001}).remote()
others = [actor.options(num_cpus=0.5).remote() for _ in range(2)]
home = ray.get_runtime_context().get_node_id()
result = {
    "before": before,
    "may_grow": may_grow(),
    "others_at_home": all(node == home for node in ray.get([other.node.remote() for other in others])),
    "generator_at_home": ray.get(on_generator.node.remote(), timeout=60) == home,
    "with_node": cluster_capacity(),
    "generators": cluster_capacity("generator_node"),
    "may_grow_from_node": ray.get(on_generator.may_grow.remote()),
}
ray.kill(on_generator)
wait_until(1)
print(json.dumps(result))
"""


def test_an_actor_brings_a_node_up_its_end_lets_it_go_and_capacity_counts_both() -> None:
    """On the cluster that cluster/local.yaml describes, with less patience for idle nodes."""
    cluster = yaml.safe_load(LOCAL.read_text()) | {"idle_timeout_minutes": 2 / 60}
    with autoscaling_head(cluster) as head:
        result = json.loads(head.run(_DRIVER).splitlines()[-1])
        assert len(head.raylets()) == 1
    assert result["others_at_home"] and not result["generator_at_home"]
    assert result["may_grow"] and result["may_grow_from_node"]
    kinds = ("CPU", "learner_node", "teacher_node", "generator_node")
    held = {
        where: tuple(result[where].get(kind, 0) for kind in kinds) for where in ("before", "with_node", "generators")
    }
    assert held == {"before": (2, 1, 1, 0), "with_node": (3, 1, 1, 1), "generators": (1, 0, 0, 1)}
