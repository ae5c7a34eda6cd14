"""The ledger: admission in order, capacity, exactly one release."""

import asyncio

import pytest

from opd_ray.buffer.slots import Slots


def test_slots_are_numbered_in_order_and_limited_by_capacity():
    async def scenario():
        slots = Slots(capacity=5, first=10)
        assert await slots.take(3) == [10, 11, 12]
        assert await slots.take(3) == [13, 14]
        assert len(slots.taken) == 5

    asyncio.run(scenario())


def test_a_full_ledger_admits_only_after_a_release():
    async def scenario():
        slots = Slots(capacity=2)
        assert await slots.take(2) == [0, 1]
        waiting = asyncio.create_task(slots.take(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        slots.free([0])
        assert await waiting == [2]

    asyncio.run(scenario())


@pytest.mark.parametrize("freed", [[7], [0, 0]])
def test_freeing_what_is_not_taken_or_twice_is_an_error(freed):
    async def scenario():
        slots = Slots(capacity=2)
        await slots.take(2)
        with pytest.raises(ValueError, match="freed twice or were never taken"):
            slots.free(freed)
        assert len(slots.taken) == 2

    asyncio.run(scenario())
