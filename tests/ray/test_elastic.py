"""A run on a cluster that grows and shrinks: nodes come on demand, die without a word or announce their end, and go
when nobody needs them.

One run goes through all of it. Engines and learner are real, on small random models; every node is a real one of Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import gated_driver
from autoscaling_head import AutoscalingHead, NodeType, autoscaling_head, fake_cluster
from gated_driver import GATES
from opd_ray.errors import InputError
from opd_ray.report.lanes import lanes
from opd_ray.report.runs import read_run
from opd_ray.status import state
from rollout_log import assert_each_prompt_once, rows

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(900)]

STEPS, PROMPTS_PER_STEP, MAX_STALENESS = 62, 8, 2
OVERRIDES = [
    # Long responses, one at a time: the generators are what the learner waits for, unless it is held.
    *("rollout.engine=torch", "rollout.max_num_seqs=1", "rollout.prompts_per_call=2", "rollout.max_response_tokens=48"),
    *("rollout.num_generators=1", "rollout.min_generators=1", "rollout.max_generators=2"),
    *("rollout.node_resource=generator_node", "rollout.cpus_per_generator=1"),
    *("learner.num_ranks=2", "learner.placement=strict_pack", "learner.node_resource=learner_node"),
    *("teacher.node_resource=learner_node", "loss.reference.coef=0"),
    *(f"buffer.prompts_per_step={PROMPTS_PER_STEP}", f"buffer.max_staleness={MAX_STALENESS}", "guard.level=off"),
    *(f"learner.steps={STEPS}", "metrics.rollout_log_every_steps=1", "metrics.trace=true"),
    *("evaluation.num_problems=0", "evaluation.every_steps=0", "checkpoint.every_steps=0"),
    *("elastic.grow_after_s=1.5", "elastic.shrink_after_s=6"),
]


@dataclass
class Watched:
    """The run, as one sees it from outside, and what was seen."""

    directory: Path
    driver: subprocess.Popen[bytes]
    at: dict[str, float] = field(default_factory=dict)
    """When things were first seen, seconds of a monotonic clock."""
    killed_at_step: int = 0
    killed_generator: str = ""
    moved_generator: str = ""
    reissued: float = 0.0
    """Calls that were given to another worker before a node was announced to go."""
    nodes: dict[str, int] = field(default_factory=dict)
    """How many there were, the head's included."""

    held_at = next(step for step, gate in GATES.items() if gate == "replaced")

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def until(self, what: str, seen: Callable[[], Any], timeout_s: float = 240.0) -> Any:
        """Waits for it, and notes when it was there. Raises AssertionError when it does not come."""
        give_up = time.monotonic() + timeout_s
        while not (result := seen()):
            ended = self.driver.poll()
            assert ended is None, f"the driver ended with {ended} before this: {what}\n{self.printed()}"
            assert time.monotonic() < give_up, f"not within {timeout_s:g} s: {what}\n{self.printed()}"
            time.sleep(0.1)
        self.at[what] = time.monotonic()
        return result

    def open(self, gate: str) -> None:
        (self.directory / gate).touch()

    def places(self, gate: str) -> dict[str, Any]:
        """Where actors were when the run passed a gate."""
        return json.loads((self.directory / f"{gate}.json").read_text())

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def step(self) -> int:
        return self.metrics().get("step", 0)

    def metrics(self) -> dict[str, Any]:
        """Those of the last step."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def num_ready(self, since: float = 0.0) -> int:
        """Generators at work, as the run's status says; 0 where that is older than ``since``, in seconds of time()."""
        try:
            now = state.read(self.run_dir / state.FILE)
        except InputError:
            return 0
        return next(room.ready for room in now.rooms if room.room == "generate") if now.time > since else 0

    def student_rows(self) -> list[dict[str, Any]]:
        return [row for row in rows(self.run_dir) if row["source"] == "student"]

    def workers(self) -> list[str]:
        """Generators of which rollouts were trained on, in the order of their first ones."""
        return list(dict.fromkeys(row["worker"] for row in self.student_rows()))

    def printed(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-4000:]


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    generator = NodeType({"CPU": 1, "generator_node": 1}, maximum=3)  # one that goes, and for whom it had
    cluster = fake_cluster({"generator": generator}, head={"CPU": 2, "learner_node": 1}, idle_timeout_s=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(gated_driver.__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        with autoscaling_head(cluster) as head:
            yield head


@pytest.fixture(scope="module")
def watched(head: AutoscalingHead, world, preloaded_job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run that has ended: it grew, lost a node, had it replaced, left one that announced its end, gave one back."""
    directory = tmp_path_factory.mktemp("elastic")
    command = [sys.executable, "-c", "import gated_driver; gated_driver.drive()", str(directory)]
    with (directory / "log").open("wb") as log:
        driver = subprocess.Popen(
            [*command, *world.overrides(), *OVERRIDES],
            env=head.environment | preloaded_job,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    watched = Watched(directory, driver)
    try:
        _go_through_it(watched, head)
        driver.wait(timeout=240)
        yield watched
    finally:
        driver.kill()
        driver.wait()


def _go_through_it(run: Watched, head: AutoscalingHead) -> None:
    run.until("first step", lambda: run.step() >= 1)
    run.until("demand", lambda: run.events("pool_resized"))
    run.until("two at work", lambda: run.num_ready() == 2)
    run.open("grown")
    run.until("rollouts of both", lambda: run.step() > 40 and len(run.workers()) == 2)
    before = head.raylets().keys()
    run.nodes["grown"] = len(before)

    run.killed_generator = run.workers()[1]
    [node] = [node for _, name, node in run.places("grown")["actors"] if name == run.killed_generator]
    run.killed_at_step = run.step()
    run.at["kill"] = time.monotonic()
    head.kill_node(node)
    run.until("step after the kill", lambda: run.step() > run.killed_at_step)
    run.until("loss noticed", lambda: run.events("worker_lost"))
    run.until("another node", lambda: len(head.raylets()) == 3)
    now = time.time()  # the status before that had two as well
    run.until("two at work again", lambda: run.num_ready(now) == 2)
    run.until("held", lambda: run.step() == run.held_at)
    run.reissued = run.metrics()["recovery/reissued_calls"]
    run.open("replaced")

    run.until("it goes on", lambda: run.step() > run.held_at)
    run.moved_generator = run.workers()[0]
    [node] = [node for _, name, node in run.places("replaced")["actors"] if name == run.moved_generator]
    head.drain_node(node, 120)
    run.until("told to leave", lambda: run.events("worker_leaves"))
    left = time.time()
    run.until("two at work once more", lambda: run.num_ready(left) == 2)

    run.until("one given back", lambda: len(run.events("worker_leaves")) == 2)
    run.until("one at work", lambda: run.num_ready() == 1)
    run.until("its node gone", lambda: len(head.raylets()) == 2)
    run.nodes["given back"] = len(head.raylets())
    run.open("given back")


def test_demand_brings_a_node_up_in_mid_run_and_its_generator_samples_with_current_weights(watched: Watched) -> None:
    first, second = watched.workers()[:2]
    joined = [row for row in watched.student_rows() if row["worker"] == second]
    assert watched.events("pool_resized")[0]["text"].startswith("generate: has more to do than its workers can")
    assert watched.nodes["grown"] == 3
    assert first != second
    oldest = [min(row["weight_versions"]) for row in joined]
    assert min(oldest) > 0, "it began with the weights of the step that it came to"
    assert all(row["step"] - 1 - version <= MAX_STALENESS for row, version in zip(joined, oldest, strict=True))


def test_the_run_goes_on_when_a_node_dies_and_another_takes_its_place(watched: Watched) -> None:
    lost = watched.events("worker_lost")
    assert [event["worker"] for event in lost] == [watched.killed_generator], "one death, counted once"
    third = watched.workers()[2]
    assert min(row["step"] for row in watched.student_rows() if row["worker"] == third) > watched.killed_at_step
    waited = watched.at["step after the kill"] - watched.at["kill"]
    assert waited < 30, f"the next step ended {waited:.0f} s after the node died"


def test_a_generator_leaves_a_node_that_announces_its_end_and_no_call_is_issued_again(watched: Watched) -> None:
    leaves, _ = watched.events("worker_leaves")
    assert leaves["worker"] == watched.moved_generator
    assert ": its node goes in 1" in leaves["text"] and leaves["text"].endswith("; another takes its place")
    assert watched.metrics()["recovery/reissued_calls"] == watched.reissued


def test_idleness_gives_a_generator_and_its_node_back(watched: Watched) -> None:
    assert any("could do with one worker less" in event["text"] for event in watched.events("pool_resized"))
    assert watched.nodes["given back"] == 2


def test_no_prompt_is_lost_or_trained_twice_on_the_way(watched: Watched) -> None:
    assert watched.driver.returncode == 0, watched.printed()
    assert_each_prompt_once(
        watched.run_dir, steps=STEPS, prompts_per_step=PROMPTS_PER_STEP, max_staleness=MAX_STALENESS
    )
    summary = json.loads((watched.run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["restarts_by_room"]) == (STEPS, {"generate": 1})


def test_the_trace_has_lanes_of_generators_on_both_nodes(watched: Watched) -> None:
    [chart] = lanes([read_run(watched.run_dir)])
    generating = {lane["name"] for lane in chart["lanes"] if dict(lane["shares"]).get("generate")}
    # What the one that was killed did since it was last asked went with it.
    assert set(watched.workers()) - {watched.killed_generator} <= generating, "also of those that have left"
    assert len({node for _, name, node in watched.places("replaced")["actors"] if name in generating}) == 2


@pytest.mark.parametrize("gate", GATES.values())
def test_learner_ranks_stay_together_and_generator_nodes_hold_generators_only(watched: Watched, gate: str) -> None:
    places = watched.places(gate)
    [learner_node] = [node for node, resources in places["nodes"].items() if resources == ["learner_node"]]
    assert places["placement_groups"] == [[learner_node, learner_node]]
    by_class: dict[str, set[str]] = {}
    for actor_class, _, node in places["actors"]:
        by_class.setdefault(actor_class, set()).add(node)
    generator_nodes = by_class.pop("StudentGenerator")
    assert generator_nodes and learner_node not in generator_nodes
    assert by_class == dict.fromkeys(("Learner", "Scorer", "Recorder"), {learner_node})
