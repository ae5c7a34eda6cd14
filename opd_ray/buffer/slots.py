"""The ledger of slots: how many prompts may be under way at once.

A slot is taken when a prompt is admitted and freed exactly once, after its rollouts were trained on
and the weights that came of it were broadcast. Slots are numbered in the order of
admission, and steps consume them in that order. With (max_staleness + 1) steps' worth of slots,
slot ``i`` of step ``s`` is admitted only after step ``s - max_staleness - 1`` has been broadcast,
so its first token is at most ``max_staleness`` versions older than the weights it trains —
without dropping anything, and so without a bias against long responses.
"""

from __future__ import annotations

import asyncio


class Slots:
    """Numbers the prompts from ``first`` on and admits those for which there is room."""

    def __init__(self, capacity: int, first: int = 0) -> None:
        self.capacity = capacity
        self.next = first
        """The first slot that was not taken yet."""
        self.taken: set[int] = set()
        """Slots that are taken and not free again."""
        self._room = asyncio.Event()
        self._room.set()

    async def take(self, most: int) -> list[int]:
        """Waits until a slot is free, then takes up to ``most``, in order."""
        await self._room.wait()
        count = min(most, self.capacity - len(self.taken))
        slots = list(range(self.next, self.next + count))
        self.next += count
        self.taken.update(slots)
        self._signal()
        return slots

    def free(self, slots: list[int]) -> None:
        """Frees slots that are taken; freeing one twice is an error in the caller."""
        unknown = sorted(set(slots) - self.taken)
        if unknown or len(set(slots)) != len(slots):
            raise ValueError(f"slots {unknown or slots} are freed twice or were never taken")
        self.taken.difference_update(slots)
        self._signal()

    def _signal(self) -> None:
        if len(self.taken) < self.capacity:
            self._room.set()
        else:
            self._room.clear()
