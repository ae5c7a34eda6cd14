"""The buffer: which rollouts a step holds, and when it is complete."""

import asyncio

import pytest

from factories import entry, golden
from opd_ray.buffer import ReplayBuffer
from opd_ray.prompts import Shuffled


def make(prompts_per_step=2, golden_per_step=1, num_golden=3):
    rows = [golden(i) for i in range(num_golden)]
    return ReplayBuffer(prompts_per_step, golden_per_step, rows, Shuffled(num_golden, seed=0, shuffle=False))


def test_a_step_holds_its_own_slots_whatever_the_order_they_arrived_in():
    async def scenario():
        buffer = make()
        await buffer.add([entry(3), entry(1)])
        await buffer.add([entry(0), entry(2)])
        first, second = await buffer.take(0), await buffer.take(1)
        assert [each.meta.slot for each in first] == [0, 1, -1]
        assert [each.meta.slot for each in second] == [2, 3, -1]
        assert buffer.num_slots == 0

    asyncio.run(scenario())


def test_a_step_waits_for_its_slowest_rollout_instead_of_dropping_it():
    async def scenario():
        buffer = make()
        await buffer.add([entry(0), entry(2), entry(3)])
        waiting = asyncio.create_task(buffer.take(0))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert buffer.missing(0) == [1]
        await buffer.add([entry(1)])
        assert [each.meta.slot for each in await waiting] == [0, 1, -1]

    asyncio.run(scenario())


def test_golden_rollouts_are_visited_once_per_epoch():
    async def scenario():
        buffer = make(prompts_per_step=0, golden_per_step=2, num_golden=3)
        seen = [each.meta.rollout_id for step in range(3) for each in await buffer.take(step)]
        assert seen == ["golden-0", "golden-1", "golden-2"] * 2

    asyncio.run(scenario())


def test_all_responses_of_a_prompt_share_its_slot():
    async def scenario():
        buffer = make(prompts_per_step=1, golden_per_step=0)
        await buffer.add([entry(0, row=0), entry(0, row=1, rollout_id="0-1")])
        assert [each.meta.rollout_id for each in await buffer.take(0)] == ["0-0", "0-1"]

    asyncio.run(scenario())


def test_a_slot_that_comes_twice_is_an_error():
    async def scenario():
        buffer = make()
        await buffer.add([entry(0)])
        with pytest.raises(ValueError, match=r"slots \[0\] are in the buffer already"):
            await buffer.add([entry(0)])

    asyncio.run(scenario())
