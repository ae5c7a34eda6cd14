"""The buffer: which rollouts a step holds, and when it is complete."""

import asyncio

import pytest

from opd_ray.buffer.replay import GoldenSet, ReplayBuffer
from opd_ray.data.orders import Shuffled
from small_messages import entry, golden


def golden_set(num_golden=3, by_prompt=None):
    return GoldenSet([golden(i) for i in range(num_golden)], Shuffled(num_golden, seed=0, shuffle=False), by_prompt)


def make(prompts_per_step=2):
    return ReplayBuffer(prompts_per_step, golden_set())


def test_a_step_holds_its_own_slots_whatever_the_order_they_arrived_in():
    async def scenario():
        buffer = make()
        await buffer.add([3, 1], [entry(3), entry(1)])
        await buffer.add([0, 2], [entry(0), entry(2)])
        first, second = await buffer.take(0), await buffer.take(1)
        assert [each.meta.slot for each in first] == [0, 1]
        assert [each.meta.slot for each in second] == [2, 3]
        assert buffer.slots == {}

    asyncio.run(scenario())


def test_a_step_waits_for_its_slowest_rollout_instead_of_dropping_it():
    async def scenario():
        buffer = make()
        await buffer.add([0, 2, 3], [entry(0), entry(2), entry(3)])
        waiting = asyncio.create_task(buffer.take(0))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert buffer.missing(0) == [1]
        await buffer.add([1], [entry(1)])
        assert [each.meta.slot for each in await waiting] == [0, 1]

    asyncio.run(scenario())


def test_a_slot_without_rollouts_still_completes_its_step():
    """Of an off-policy step, or where every teacher rollout was filtered out."""

    async def scenario():
        buffer = make()
        await buffer.add([0, 1], [entry(1)])
        assert [each.meta.slot for each in await buffer.take(0)] == [1]

    asyncio.run(scenario())


def test_golden_rollouts_are_visited_once_per_epoch_and_go_on_where_they_stopped():
    shelf = golden_set()
    seen = [each.meta.rollout_id for _ in range(3) for each in shelf.take(2, [])]
    assert seen == ["golden-0", "golden-1", "golden-2"] * 2
    again = golden_set()
    again.position = 4
    assert [each.meta.rollout_id for each in again.take(2, [])] == seen[4:]


def test_paired_golden_rollouts_belong_to_the_prompts_of_the_step():
    shelf = golden_set(by_prompt={"a": 2, "b": 0, "c": 1})
    assert [each.meta.rollout_id for each in shelf.take(3, ["b", "a", "c"])] == ["golden-0", "golden-2", "golden-1"]
    assert [each.meta.rollout_id for each in shelf.take(1, ["c", "a", "b"])] == ["golden-1"]


def test_a_prompt_without_a_solution_gets_none():
    shelf = golden_set(by_prompt={"a": 2, "c": 1})
    assert [each.meta.rollout_id for each in shelf.take(3, ["b", "a", "c"])] == ["golden-2", "golden-1"]


def test_all_responses_of_a_prompt_share_its_slot():
    async def scenario():
        buffer = make(prompts_per_step=1)
        await buffer.add([0], [entry(0, row=0), entry(0, row=1, rollout_id="0-1")])
        assert [each.meta.rollout_id for each in await buffer.take(0)] == ["0-0", "0-1"]

    asyncio.run(scenario())


def test_a_slot_that_comes_twice_is_an_error():
    async def scenario():
        buffer = make()
        await buffer.add([0], [entry(0)])
        with pytest.raises(ValueError, match=r"slots \[0\] are in the buffer already"):
            await buffer.add([0], [entry(0)])

    asyncio.run(scenario())


def test_the_guard_gets_more_than_one_golden_rollout_a_prompt_where_they_are_paired():
    """The bug: with golden_pairing=prompt its strongest remedy was out of reach, for one a prompt was the most."""
    entries = [golden(i) for i in range(6)]
    paired = GoldenSet(entries, Shuffled(6, seed=0, shuffle=False), {"a": 4, "b": 5})
    taken = paired.take(4, ["a", "b"])
    assert [entries.index(entry) for entry in taken] == [4, 5, 0, 1]
