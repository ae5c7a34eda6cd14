"""An autoscaling cluster on this machine: nodes come on demand and go when idle, and a job knows how many there may be.

pytest.mark.ray: every node is a real one of Ray.
"""

from __future__ import annotations

import json

import pytest

from autoscaling_head import NodeType, autoscaling_head, fake_cluster

pytestmark = pytest.mark.ray

_DRIVER = """
import json, time
import ray
from opd_ray.capacity import cluster_capacity

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
    generator = NodeType({"CPU": 1, "generator_node": 1}, maximum=3)
    cluster = fake_cluster({"generator": generator}, head={"CPU": 2}, idle_timeout_s=2)
    with autoscaling_head(cluster) as head:
        result = json.loads(head.run(_DRIVER).splitlines()[-1])
        assert len(head.raylets()) == 1
    assert result["before"]["CPU"] == 2 + 3
    assert result["before"]["generator_node"] == 3
    assert result["generators"]["CPU"] == 3
    assert result["others_at_home"] and not result["generator_at_home"]
    for where in ("with_node", "from_node"):
        assert result[where]["CPU"] == 5 and result[where]["generator_node"] == 3
