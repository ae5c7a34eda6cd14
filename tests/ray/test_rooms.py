"""The rooms on real Ray: who joins the broadcast, what followers hold after it, and a second run in the same actors."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from opd_ray import config as configs
from opd_ray.errors import RunError
from opd_ray.messages import PromptGroup, SamplingSettings, ScoreRequest
from opd_ray.placement import launch
from opd_ray.placement.nodes import places_of
from opd_ray.placement.wanted import Wanted
from opd_ray.rooms import Rooms
from opd_ray.rooms.room import UNPLACED
from opd_ray.weights.delivery import Delivery

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STOPS = (1,)
SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=12, stop_token_ids=STOPS, top_k=3)
FOLLOWING = [
    "rollout.engine=torch",
    "rollout.num_generators=2",
    "rollout.teacher_generators=1",
    "buffer.teacher_per_prompt=1",
    "loss.teacher.coef=0.5",
    "reference.update=average",
    "reference.update_decay=0.9",
    "reference.num_actors=2",
    "more_teachers={self: {path: student, update: periodic, update_every_steps: 2}}",
]


def load(world, *overrides: str) -> configs.Config:
    config = configs.load(None, [*world.overrides(), *FOLLOWING, *overrides])
    student = config.student.path
    scorers = {name: dataclasses.replace(each, path=student) for name, each in config.more_teachers.items()}
    return dataclasses.replace(
        config, reference=dataclasses.replace(config.reference, path=student), more_teachers=scorers
    )


@pytest.fixture(scope="module")
def rooms(world, ray_here):
    """Up, with the world's student in all that sample with it or follow it."""
    config = load(world)
    rooms = launch.start_rooms(Wanted.of([config]), 96)

    async def bring_up() -> None:
        limit = config.deadlines.start_s
        await asyncio.gather(launch.up(config, rooms), *(pool.up(limit) for pool in rooms.pools))
        await launch.begin(config, rooms, STOPS)
        await broadcast(config, rooms, 0)

    asyncio.run(bring_up())
    yield rooms
    rooms.stop()


def groups(number: int, responses: int = 2) -> list[PromptGroup]:
    return [
        PromptGroup(slot, f"p{slot}", (5, 6, 7 + slot), {"answer": "x"}, responses, seed=slot) for slot in range(number)
    ]


async def broadcast(config: configs.Config, rooms: Rooms, version: int) -> None:
    """What the learner holds, to all, as a run brings it to them."""
    failures: list[str] = []
    delivery = Delivery(config, rooms, lambda kind, text, **_: failures.append(text))
    delivery.manifest = (await rooms.learner.call_all("manifest", version))[0]
    async with delivery.lock:
        await delivery.broadcast(version)
    assert failures == []


async def scores_of(rooms, role: str, rollouts) -> list[list[float]]:
    """The response log-probs by every member of a pool."""
    refs = [
        member.handle.score.options(num_returns=2).remote(rollouts, ScoreRequest(stop_token_ids=STOPS))[1]
        for member in rooms.scorers[role].members
    ]
    return [ray.get(ref)["logprobs"].to_pylist() for ref in refs]


def by_model(path: Path, rollouts) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    for prompt, response in zip(
        rollouts["prompt_tokens"].to_pylist(), rollouts["response_tokens"].to_pylist(), strict=True
    ):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].numpy())
    return rows


def assert_scored_by(path: Path, scores: list[list[float]], rollouts) -> None:
    for ours, theirs in zip(scores, by_model(path, rollouts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_every_room_has_its_actors_and_names(rooms):
    names = {room: [member.name for member in pool.members] for room, pool in rooms.all.items()}
    assert names == {
        "generate": ["student-generator-0", "student-generator-1"],
        "learn": ["learner-0"],
        "teacher": ["teacher-scorer-0"],
        "self": ["self-scorer-0"],
        "reference": ["reference-scorer-0", "reference-scorer-1"],
        "teacher_generate": ["teacher-generator-0"],
    }
    assert sorted(rooms.followers) == ["reference", "self"]
    members = [member for pool in rooms.all.values() for member in pool.members]
    assert UNPLACED not in {member.node for member in members}
    assert places_of([member.handle for member in members]) == [member.node for member in members]


def test_generators_on_cpus_go_behind_scorers_and_learner(rooms):
    """In the threads of their engines alone: what answers a ping, a broadcast and the judge is not held up."""

    def policies(_: object) -> tuple[int, set[int]]:
        return os.sched_getscheduler(0), {
            os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")
        }

    members = {room: pool.members[0].handle.__ray_call__ for room, pool in rooms.all.items()}
    found = dict(zip(members, ray.get([call.remote(policies) for call in members.values()], timeout=60), strict=True))
    behind = {room for room, (_, of_threads) in found.items() if os.SCHED_IDLE in of_threads}
    assert behind == {"generate", "teacher_generate"}
    assert {own for own, _ in found.values()} == {os.SCHED_OTHER}


def test_an_actor_has_a_place_before_it_is_up(ray_here):
    class Loading:
        def __init__(self) -> None:
            time.sleep(600)

    actors = [ray.remote(Loading).options(num_cpus=cpus).remote() for cpus in (0, 1000)]
    until = time.monotonic() + 60
    while places_of(actors[:1]) == [None]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert places_of(actors[1:2]) == [None]
    for actor in actors:
        ray.kill(actor)


def test_a_broadcast_reaches_generators_and_followers_and_another_run_begins_from_its_own_student(
    rooms, world, tmp_path
):
    async def scenario():
        config = load(world)
        _, rollouts = await rooms.generators.call("generate", groups(3), SAMPLING)
        payload = ray.get(rollouts)
        teachers, written = await rooms.teacher_generators.call("generate", groups(2), SAMPLING)
        assert {meta.source for meta in teachers} == {"teacher"}
        assert_scored_by(world.teacher, (await scores_of(rooms, "teacher", written))[0], ray.get(written))

        # A run on another student: what the scorers had of the first one is gone.
        moved = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        other = tmp_path / "other"
        moved.save_pretrained(other)
        for file in world.student.iterdir():
            if file.suffix != ".safetensors" and not (other / file.name).exists():
                (other / file.name).write_bytes(file.read_bytes())
        second = load(world, f"student.path={other}")
        await launch.begin(second, rooms, STOPS)
        await broadcast(second, rooms, 0)
        metas, again = await rooms.generators.call("generate", groups(1), SAMPLING)
        theirs = by_model(other, ray.get(again))
        behaviour = ray.get(again)["behaviour_logprobs"].to_pylist()
        for ours, expected in zip(behaviour, theirs, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4)
        for role in ("reference", "self"):
            for each in await scores_of(rooms, role, rollouts):
                assert_scored_by(other, each, payload)

        # Back to the first student, whose weights then stand for versions 1 and 2 of this run.
        await launch.begin(second, rooms, STOPS)
        await rooms.learner.call_all("begin", config, str(world.student), STOPS)
        await broadcast(config, rooms, 1)
        assert_scored_by(other, (await scores_of(rooms, "self", rollouts))[0], payload)
        await broadcast(config, rooms, 2)
        assert_scored_by(world.student, (await scores_of(rooms, "self", rollouts))[0], payload)
        averages = await scores_of(rooms, "reference", rollouts)
        assert averages[0] == averages[1], "members of one pool hold the same average"
        first, last = (np.concatenate(by_model(path, payload)) for path in (other, world.student))
        average = np.concatenate(averages[0])
        assert min(np.abs(average - first).max(), np.abs(average - last).max()) > 1e-3

    asyncio.run(scenario())


def test_a_run_that_needs_what_is_not_there_is_refused(rooms, world):
    with pytest.raises(
        RunError, match="this run needs the room algebra, but the rooms that are up are generate, learn"
    ):
        asyncio.run(launch.begin(load(world, f"more_teachers.algebra.path={world.teacher}"), rooms, STOPS))
