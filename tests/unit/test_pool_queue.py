"""Queues: how many calls a worker has, who waits for whom, and what a deadline counts from."""

import asyncio
import dataclasses
import heapq
import random
import time
from itertools import chain
from types import SimpleNamespace

import pytest

import fake_ray
from fake_ray import World, until
from fake_rooms import make_pipeline
from held_actors import DEADLINE_S, Desk, Losses, desks, held
from opd_ray.config import from_dict
from opd_ray.errors import ActorError, GroupLost, MemberLost
from opd_ray.evaluation.evaluate import chunked
from opd_ray.messages import PoolSize
from opd_ray.placement import launch
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool


class Slow(Desk):
    """Takes a minute for each call."""

    async def work(self, what):
        await asyncio.sleep(60)
        return await super().work(what)


def test_a_queue_kills_nobody():
    """The bug: a call's deadline counted from the moment that it was made. Of 16 scorers with 256 calls of a minute
    each and a limit of 600 s, 24 were killed, and 196 calls were made again."""

    async def scenario():
        world = World()
        pool = Pool("teacher", world.spawning("scorer", Slow, serial=True), PoolSize.fixed(16), 600.0)
        losses = Losses(pool)
        await pool.up(600)
        began = time.monotonic()
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(256)]
        await asyncio.sleep(1)
        assert (pool.num_waiting, pool.num_calls) == (256 - 2 * 16, 256), "what waits is work as well"
        await asyncio.gather(*calls)
        assert time.monotonic() - began == pytest.approx(16 * 60, abs=1), "nobody ever idles"
        assert losses.lost == [] and pool.num_reissued == 0
        assert {len(actor.inside.asked) for actor in world.actors} == {16}

    fake_ray.run(scenario())


def test_a_queue_is_no_group_s_loss():
    """The bug: a scorer that follows the student was lost, and all of the run's state with it, for its queue."""

    async def scenario():
        world = World()
        group = Group("reference", world.spawning("scorer", Slow, serial=True), 2, 600.0)
        await group.up(600)
        calls = [asyncio.create_task(group.call("work", number)) for number in range(40)]
        await asyncio.sleep(601)
        world.actors[1].stop()
        began = time.monotonic()
        with pytest.raises(GroupLost, match=r"scorer-1 .* gave no answer within 600 s"):
            await asyncio.gather(*calls)
        assert time.monotonic() - began == pytest.approx(599, abs=1), "from its last answer, at 600 s"
        assert sum(call.done() and not call.exception() for call in calls) == 10 + 19

    fake_ray.run(scenario())


def test_one_that_hangs_with_two_calls_is_one_loss_and_both_are_made_again():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool, replaces=False)
        world.actors[0].stop()
        began = time.monotonic()
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(4)]
        await asyncio.gather(*calls)
        assert time.monotonic() - began == pytest.approx(DEADLINE_S, abs=1)
        assert [name for name, _ in losses.lost] == ["clerk-0"] and pool.num_reissued == 2

    fake_ray.run(scenario())


def test_all_calls_of_one_that_hangs_are_given_up_together():
    async def scenario():
        world = World()
        group = Group("reference", world.spawning("scorer", Slow, serial=True), 1, 100.0)
        await group.up(100)
        world.actors[0].stop()
        began = time.monotonic()
        ends = await asyncio.gather(*(group.call("work", number) for number in range(3)), return_exceptions=True)
        assert [type(each) for each in ends] == [GroupLost] * 3
        assert time.monotonic() - began == pytest.approx(100, abs=1)

    fake_ray.run(scenario())


def test_an_answer_gives_the_calls_behind_it_the_whole_limit_and_silence_none():
    async def scenario():
        world = World()
        pool = Pool("teacher", world.spawning("scorer", Slow, serial=True), PoolSize.fixed(1), 100.0)
        await pool.up(100)
        began = time.monotonic()
        first, second = (asyncio.create_task(pool.call("work", number)) for number in range(2))
        await first
        world.actors[0].stop()
        third = asyncio.create_task(pool.call("work", 2))
        with pytest.raises(MemberLost, match="gave no answer within 100 s"):
            await second
        assert time.monotonic() - began == pytest.approx(60 + 100, abs=1)
        with pytest.raises(MemberLost):
            await third

    fake_ray.run(scenario())


@pytest.mark.parametrize("comes", ["joins", "replaces"])
def test_calls_wait_while_all_are_full_and_go_on_in_order_with_one_that_comes(comes):
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool)
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(8)]
        await until(lambda: pool.num_waiting == 4)
        await asyncio.sleep(DEADLINE_S - 1)
        assert [member.num_calls for member in pool.members] == [2, 2]
        if comes == "joins":
            member = pool.grow()
            await pool.bring_up(member, DEADLINE_S)
        else:
            world.actors[1].die()
        await until(lambda: len(world.actors) == 3 and world.actors[2].inside and world.actors[2].inside.asked)
        for actor in world.living():
            actor.inside.may_answer.set()
        answers = [what for (_, what), _ in await asyncio.gather(*calls)]
        assert answers == list(range(8)) and pool.num_waiting == 0
        if comes == "joins":
            assert world.actors[2].inside.asked[:4] == [4, 5, 6, 7][: len(world.actors[2].inside.asked)]
            assert losses.lost == []
        else:
            assert sorted(world.actors[2].inside.asked[:2]) == [1, 3], "what was there before goes first"

    fake_ray.run(scenario())


def test_no_caller_overtakes_those_that_wait():
    async def scenario():
        world, pool = await desks(1)
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(4)]
        await until(lambda: pool.num_waiting == 2)
        world.actors[0].inside.may_answer.set()
        await calls[0]
        await asyncio.gather(*calls, pool.call("work", 4))
        assert world.actors[0].inside.asked == [0, 1, 2, 3, 4]

    fake_ray.run(scenario())


def test_whatever_ends_makes_room_and_a_caller_that_gives_up_passes_its_turn_on():
    async def scenario():
        world, pool = await desks(1)
        held(pool, world)
        others = [asyncio.create_task(pool.ask(pool.members[0], "tell", name)) for name in ("weights", "drain")]
        await asyncio.sleep(1)
        calls = [asyncio.create_task(pool.call("tell", number, payload=False)) for number in range(3)]
        await until(lambda: pool.num_waiting == 3)
        calls[0].cancel()
        world.actors[0].inside.may_answer.set()
        await asyncio.gather(*others)
        assert await asyncio.gather(*calls[1:]) == [("clerk-0", 1), ("clerk-0", 2)]

    fake_ray.run(scenario())


def test_without_anybody_who_replaces_those_that_wait_learn_that_nobody_is_left():
    async def scenario():
        world, pool = await desks(1)
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(5)]
        await until(lambda: pool.num_waiting == 3)
        world.actors[0].die()
        kinds = [type(each) for each in await asyncio.gather(*calls, return_exceptions=True)]
        assert kinds == [MemberLost] * 2 + [ActorError] * 3

    fake_ray.run(scenario())


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"max_num_seqs": 64, "prompts_per_call": 8, "responses_per_prompt": 4}, 4),
        ({"max_num_seqs": 64, "prompts_per_call": 10, "responses_per_prompt": 1}, 13),
        ({"max_num_seqs": 8, "prompts_per_call": 32, "responses_per_prompt": 8}, 1),
    ],
)
def test_a_generator_works_on_as_many_calls_as_fill_its_engine(changes, calls):
    assert from_dict({"rollout": changes}).rollout.calls_at_once == calls


class Engine:
    """Runs eight responses at once, in the order of the calls; a call ends with its last one."""

    def __init__(self, actor):
        self._free = [0.0] * 8

    def node(self):
        return "node"

    async def work(self, lengths):
        ends = 0.0
        for seconds in lengths:
            ended = max(time.monotonic(), heapq.heappop(self._free)) + seconds
            heapq.heappush(self._free, ended)
            ends = max(ends, ended)
        await asyncio.sleep(ends - time.monotonic())
        return None, None


@pytest.mark.parametrize("per_call", [1, 4, 8, 32])
def test_long_responses_leave_no_engine_empty(per_call):
    """The bug: a call counted as all of its responses until the longest had ended. With calls that just fill an engine
    a quarter of its places were empty, whatever the number of slots."""
    rollout = from_dict({"rollout": {"max_num_seqs": 8, "prompts_per_call": per_call}}).rollout
    rng = random.Random(0)

    async def scenario():
        world = World()
        spawn = world.spawning("generator", Engine)
        pool = Pool("generate", spawn, PoolSize.fixed(2), 600.0, calls_at_once=rollout.calls_at_once)
        await pool.up(600)
        lengths = [min(164.0, rng.lognormvariate(3.4, 0.8)) for _ in range(4096)]
        began = time.monotonic()
        await asyncio.gather(
            *(pool.call("work", lengths[at : at + per_call]) for at in range(0, len(lengths), per_call))
        )
        assert sum(lengths) / 16 > 0.92 * (time.monotonic() - began)

    fake_ray.run(scenario())


def test_a_run_in_rooms_of_another_fills_the_engines_with_its_own_calls():
    """An arm of a study with smaller calls than the first one's would leave most of every engine idle."""

    async def scenario():
        made = await make_pipeline(rollout={"prompts_per_call": 64, "responses_per_prompt": 1})
        rollout = dataclasses.replace(made.config.rollout, prompts_per_call=8)
        await launch.begin(dataclasses.replace(made.config, rollout=rollout), made.rooms, (0,))
        assert (made.config.rollout.calls_at_once, made.rooms.generators.calls_at_once) == (2, 16)

    fake_ray.run(scenario())


def evaluated(generators, **rollout):
    """What an evaluation of 40 problems says, and the problems of each call by its generator."""

    async def scenario():
        made = await make_pipeline(rollout={"num_generators": generators, **rollout})
        asked = {}

        def before(actor, method):
            if method == "generate":
                asked.setdefault(actor.name, []).append(method)

        made.cast.world.before = before
        evaluation = await made.pipeline.evaluate(40)
        return evaluation, asked, [len(slots) for kind, slots, *_ in generate_calls(made.log)]

    return fake_ray.run(scenario())


def generate_calls(log):
    return [entry for entry in log if entry[0] == "generate"]


def test_an_evaluation_uses_every_generator():
    """The bug: chunks were as wide as one engine, so that 4 generators of 64 had all the work."""
    evaluation, asked, sizes = evaluated(20)
    assert len(asked) == 20 and set(sizes) == {2}
    alone, asked, sizes = evaluated(1)
    assert len(asked) == 1 and set(sizes) == {40}
    small, _, sizes = evaluated(3, max_num_seqs=8)
    assert set(sizes) == {8}
    for other in (alone, small):
        assert dataclasses.asdict(other) == dataclasses.asdict(evaluation)


def test_chunks_keep_the_problems_order_and_are_no_wider_than_an_engine():
    for ready, most in [(0, 64), (1, 7), (64, 64), (300, 5)]:
        pool = SimpleNamespace(those=lambda *_, ready=ready: [None] * ready)
        for samples in (1, 3):
            groups = [SimpleNamespace(slot=slot, num_responses=samples) for slot in range(129)]
            chunks = chunked(groups, pool, most)
            assert [group.slot for group in chain.from_iterable(chunks)] == list(range(129))
            assert max(map(len, chunks)) <= max(1, most // samples) and len(chunks) >= min(ready, 43)
