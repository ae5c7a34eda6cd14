"""Snapshots in memory only where the object stores of the nodes have the room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from known_models import QWEN25_1B5, QWEN25_7B, TINY
from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.models.size import ModelSize
from opd_ray.placement.nodes import Node
from opd_ray.plan.snapshots import with_room

GB = 1e9


def facts(student: ModelSize) -> SimpleNamespace:
    sizes = {"student": student, "teacher": QWEN25_7B, "reference": student}
    return SimpleNamespace(
        max_prompt_tokens=512, max_context_tokens=8704, eos_token_ids=(1,), num_prompts=13_000, sizes=sizes
    )


def node(store: float, *, gpus: float = 4, name: str = "node-1", resources: frozenset[str] = frozenset()) -> Node:
    return Node(name, name, 64.0, gpus, 1e12, store, resources)


def kept(config: Config, student: ModelSize, *there: Node) -> bool:
    """In memory; what is said agrees."""
    after, said = with_room(config, facts(student), there)
    assert (said is None) == (after == config) and (said is None or "\n" not in said)
    return after.checkpoint.memory_every_steps > 0


def recipe(name: str) -> Config:
    return configs.load(Path(configs.__file__).parents[1] / "recipes" / f"{name}.yaml", [])


def test_the_papers_recipes_keep_what_their_nodes_have_room_for() -> None:
    """4 × H200 with 2 TB of memory, of which Ray gives its store 200 GB, its most by default: 1.5 B takes 37 GB of
    that, 7.6 B 183 GB. With 512 GB of memory, three tenths of which are the store's, 7.6 B goes to disk."""
    small, large = recipe("paper_stableopd_1.5b"), recipe("paper_stableopd_7b")
    assert kept(small, QWEN25_1B5, node(200 * GB)) and kept(large, QWEN25_7B, node(200 * GB))
    assert kept(small, QWEN25_1B5, node(150 * GB)) and not kept(large, QWEN25_7B, node(150 * GB))
    _, said = with_room(large, facts(QWEN25_7B), [node(150 * GB)])
    assert said.startswith("snapshots: in memory they would take 18")
    assert "the object store of node-1 has 150.0 GB: they are on disk alone, every 50 steps" in said


def test_the_learners_pod_on_kubernetes_has_the_room_for_the_snapshots_of_its_job() -> None:
    """Ray's store is three tenths of the pod's memory, and no more than .95 of its /dev/shm."""
    cluster = Path(__file__).parents[2] / "cluster"
    (manifest,) = yaml.safe_load_all((cluster / "kuberay-cluster.yaml").read_text())
    (learner,) = (each for each in manifest["spec"]["workerGroupSpecs"] if each["groupName"] == "learner")
    pod = learner["template"]["spec"]
    (shm,) = (each["emptyDir"]["sizeLimit"] for each in pod["volumes"] if each["name"] == "shm")
    memory = pod["containers"][0]["resources"]["limits"]["memory"]
    store = min(0.95 * int(shm.removesuffix("Gi")), 0.3 * int(memory.removesuffix("Gi"))) * 2**30
    job = configs.load(cluster / "job.yaml", [])
    there = node(store, resources=frozenset({"learner_node"}))
    assert kept(job, QWEN25_1B5, there) and not kept(job, QWEN25_7B, there)


def learners(*overrides: str) -> Config:
    return configs.load(None, ["learner.num_ranks=4", "learner.gpus_per_rank=1", *overrides])


@pytest.mark.parametrize(
    ("overrides", "stores", "expected"),
    [
        ([], [(190, 4), (1, 0)], True),  # a node without GPUs hosts no rank
        ([], [(190, 4), (100, 4)], False),  # all four may be on either
        ([], [(100, 2), (100, 2)], True),  # two on each
        (["learner.placement=spread"], [(100, 4), (100, 4)], True),
        (["learner.placement=spread"], [(100, 4), (1, 0)], False),  # all four on the only one that may host any
        (["learner.placement=spread"], [(145, 4), (60, 1)], True),  # one on the small one, three on the other
        (["learner.placement=spread"], [(130, 4), (60, 1)], False),
        (["checkpoint.memory_every_steps=0"], [(1, 4)], False),
        ([], [], True),  # an autoscaler has started none yet
    ],
)
def test_each_node_that_may_host_ranks_has_room_for_their_parts(
    overrides: list[str], stores: list[tuple[float, float]], expected: bool
) -> None:
    there = [node(store * GB, gpus=gpus, name=f"node-{number}") for number, (store, gpus) in enumerate(stores)]
    assert kept(learners(*overrides), QWEN25_7B, *there) is expected


def test_a_node_without_the_learners_resource_does_not_count() -> None:
    there = [node(1 * GB), node(190 * GB, name="node-2", resources=frozenset({"learners"}))]
    assert kept(learners("learner.node_resource=learners"), QWEN25_7B, *there)


def test_the_embedded_default_keeps_its_snapshots_in_a_small_store() -> None:
    assert kept(configs.load(None, []), TINY, node(0.2 * GB, gpus=0))
