"""An autoscaling cluster on this machine: nodes come on demand and go when idle, and a job knows how many there may be.

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
from opd_ray.placement.capacity import cluster_capacity

ray.init(log_to_driver=False, logging_level="ERROR")

class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()

    def capacity(self):
        return cluster_capacity()

def wait_until(number):
    while sum(node["Alive"] for node in ray.nodes()) != number:
        time.sleep(0.1)

before = cluster_capacity()
generators = cluster_capacity("generator_node")
actor = ray.remote(Where)
on_generator = actor.options(num_cpus=0.5, resources={"generator_node": 0.001}).remote()
others = [actor.options(num_cpus=0.5).remote() for _ in range(2)]
home = ray.get_runtime_context().get_node_id()
result = {
    "before": before,
    "generators": generators,
    "others_at_home": all(node == home for node in ray.get([other.node.remote() for other in others])),
    "generator_at_home": ray.get(on_generator.node.remote(), timeout=60) == home,
    "with_node": cluster_capacity(),
    "from_node": ray.get(on_generator.capacity.remote()),
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
    assert result["generators"]["CPU"] == 2
    for where in ("before", "with_node", "from_node"):
        assert result[where]["CPU"] == 2 + 2
        assert {name: result[where][name] for name in ("learner_node", "teacher_node", "generator_node")} == {
            "learner_node": 1,
            "teacher_node": 1,
            "generator_node": 2,
        }
