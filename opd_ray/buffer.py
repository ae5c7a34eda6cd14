"""The replay buffer: metas and refs of scored rollouts, mixed with golden ones into steps.

Payloads stay in Ray's object store; an entry's refs are dropped when its step has been
taken, which lets Ray free the memory. The buffer knows neither actors nor tensors.

Order: step ``s`` holds the rollouts of slots ``s·P … s·P + P - 1`` and the next golden ones. A
fixed composition makes a run reproducible, keeps staleness within the slots' bound and long rollouts in
the batch they belong to, and lets a resumed run go on with the first slot that was not trained.
Back-pressure comes from the slots: entries that nobody takes hold theirs, so nothing new is admitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from opd_ray.messages import Entry
from opd_ray.prompts import Shuffled


class ReplayBuffer:
    """Holds scored slots until their step is complete."""

    def __init__(self, prompts_per_step: int, golden_per_step: int, golden: Sequence[Entry], order: Shuffled) -> None:
        self._prompts_per_step = prompts_per_step
        self._golden_per_step = golden_per_step
        self._golden = golden
        self._golden_order = order
        self._slots: dict[int, tuple[Entry, ...]] = {}
        self._changed = asyncio.Condition()

    @property
    def num_slots(self) -> int:
        """Slots that are scored and wait to be trained on."""
        return len(self._slots)

    async def add(self, entries: Sequence[Entry]) -> None:
        """Adds the scored rollouts of one or more slots; every slot must come whole and once."""
        by_slot: dict[int, list[Entry]] = {}
        for entry in entries:
            by_slot.setdefault(entry.meta.slot, []).append(entry)
        async with self._changed:
            known = sorted(by_slot.keys() & self._slots.keys())
            if known:
                raise ValueError(f"slots {known} are in the buffer already")
            self._slots.update({slot: tuple(group) for slot, group in by_slot.items()})
            self._changed.notify_all()

    async def take(self, step: int) -> list[Entry]:
        """Waits until every slot of ``step`` is here; returns their rollouts and the step's golden ones."""
        wanted = self.slots_of(step)
        async with self._changed:
            await self._changed.wait_for(lambda: all(slot in self._slots for slot in wanted))
            rollouts = [entry for slot in wanted for entry in self._slots.pop(slot)]
        first = step * self._golden_per_step
        golden = [self._golden[self._golden_order[first + i]] for i in range(self._golden_per_step)]
        return rollouts + golden

    def slots_of(self, step: int) -> list[int]:
        """The slots that step consumes."""
        return list(range(step * self._prompts_per_step, (step + 1) * self._prompts_per_step))

    def missing(self, step: int) -> list[int]:
        """Slots of ``step`` that are not here yet: what the learner is waiting for."""
        return [slot for slot in self.slots_of(step) if slot not in self._slots]
