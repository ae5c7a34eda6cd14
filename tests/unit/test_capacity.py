"""How large a cluster may become, from the configuration of its autoscaler."""

from __future__ import annotations

from opd_ray.capacity import Limits, limits_of, most

CLUSTER = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}},
        "learner": {"resources": {"CPU": 32, "GPU": 8, "learner_node": 1}, "max_workers": 1},
        "generator": {"resources": {"CPU": 16, "GPU": 1, "generator_node": 1}},
        "unknown": {"node_config": {}, "max_workers": 2},
    },
}


def test_a_node_type_without_a_limit_has_the_cluster_s_and_the_head_has_none() -> None:
    limits = limits_of(CLUSTER)
    assert limits.max_workers == 5
    assert [number for _, number in limits.node_types] == [0, 1, 5, 2]


def test_each_resource_is_counted_on_the_nodes_that_have_most_of_it() -> None:
    found = most(limits_of(CLUSTER))
    assert found == {"CPU": 32 + 4 * 16, "GPU": 8 + 4, "learner_node": 1, "generator_node": 5}


def test_only_nodes_with_the_asked_resource_count() -> None:
    assert most(limits_of(CLUSTER), "generator_node") == {"CPU": 80, "GPU": 5, "generator_node": 5}
    assert most(limits_of(CLUSTER), "misspelt_node") == {}


def test_no_more_nodes_than_the_whole_cluster_may_have() -> None:
    assert most(Limits(2, (({"GPU": 8}, 9),))) == {"GPU": 16}
