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
from collections.abc import Mapping, Sequence

from opd_ray.data.orders import Order
from opd_ray.messages import Entry


class GoldenSet:
    """Golden rollouts in the order in which steps take them: each once per epoch, or those of given prompts."""

    def __init__(self, entries: Sequence[Entry], order: Order, by_prompt: Mapping[str, int] | None = None) -> None:
        """``by_prompt`` maps a prompt's id to its solution's index, and makes steps take the solutions of
        their own prompts."""
        self._entries, self._order, self._by_prompt = entries, order, by_prompt
        self.position = 0
        """Golden rollouts that were taken so far; set it to go on where another run stopped."""

    def __len__(self) -> int:
        return len(self._entries)

    def next(self, count: int, prompt_ids: Sequence[str]) -> list[Entry]:
        """The next ``count`` of them; paired ones belong to ``prompt_ids``, spread evenly, each once, and a prompt that
        has none gets none. What the guard asks for beyond one a prompt comes from the shuffled ones: the same twice is
        more weight, not more data."""
        paired = min(count, len(prompt_ids)) if self._by_prompt is not None else 0
        spread = [prompt_ids[i * len(prompt_ids) // paired] for i in range(paired)]
        indices = [self._by_prompt[prompt_id] for prompt_id in spread if prompt_id in self._by_prompt]
        indices += [self._order[self.position + i] for i in range(count - paired)]
        return [self._entries[index] for index in indices]

    def take(self, count: int, prompt_ids: Sequence[str]) -> list[Entry]:
        """Takes what is ``next``."""
        entries = self.next(count, prompt_ids)
        self.position += count
        return entries


class ReplayBuffer:
    """Holds scored slots until their step is complete."""

    def __init__(self, prompts_per_step: int, golden: GoldenSet) -> None:
        self._prompts_per_step = prompts_per_step
        self.golden = golden
        self._slots: dict[int, tuple[Entry, ...]] = {}
        self._changed = asyncio.Condition()

    @property
    def slots(self) -> dict[int, tuple[Entry, ...]]:
        """The slots that are scored and wait to be trained on, and their rollouts."""
        return dict(self._slots)

    async def add(self, slots: Sequence[int], entries: Sequence[Entry]) -> None:
        """Adds whole slots with all their scored rollouts; a slot may have none, but comes once."""
        by_slot: dict[int, list[Entry]] = {slot: [] for slot in slots}
        for entry in entries:
            by_slot[entry.meta.slot].append(entry)
        async with self._changed:
            known = sorted(by_slot.keys() & self._slots.keys())
            if known:
                raise ValueError(f"slots {known} are in the buffer already")
            self._slots.update({slot: tuple(group) for slot, group in by_slot.items()})
            self._changed.notify_all()

    async def take(self, step: int) -> list[Entry]:
        """Waits until every slot of ``step`` is here and returns their rollouts."""
        wanted = self.slots_of(step)
        async with self._changed:
            await self._changed.wait_for(lambda: all(slot in self._slots for slot in wanted))
            return [entry for slot in wanted for entry in self._slots.pop(slot)]

    def slots_of(self, step: int) -> list[int]:
        """The slots that step consumes."""
        return list(range(step * self._prompts_per_step, (step + 1) * self._prompts_per_step))

    def missing(self, step: int) -> list[int]:
        """Slots of ``step`` that are not here yet: what the learner is waiting for."""
        return [slot for slot in self.slots_of(step) if slot not in self._slots]
