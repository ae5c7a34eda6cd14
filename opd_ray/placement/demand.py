"""Demand: which pool should grow, and which can do with one worker less. Pure: loads in, wishes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import fmean
from typing import NamedTuple

from opd_ray.config import ElasticConfig

_STARVING = 0.2
"""Share of the time that the learner waits for rollouts from which more of them would help."""
_BUSY = 0.9
"""Share of the time that the workers of a bottleneck have work."""
_FULL = 0.8
"""How busy the workers may be once there is one less; below _BUSY, lest they ask for it again."""


@dataclass(frozen=True)
class RoomLoad:
    """What a pool had to do since the last look."""

    room: str
    size: int
    """Workers that are ready."""
    starting: int
    """Workers that are on their way."""
    minimum: int
    maximum: int
    busy_share: float
    """Share of the time that a ready worker had calls, mean over them."""
    num_calls: int
    """Calls under way and waiting. Each is as large as the room makes it: calls beyond one for each worker are work
    that another worker could take over."""


class _Look(NamedTuple):
    """A pool at one time: workers that had calls, on average; had all of them, with more at hand; and did the learner
    wait for rollouts meanwhile, as a share of the time."""

    at: float
    busy: float
    full: bool
    waits: float


@dataclass
class _Watch:
    """A pool since it changed its size."""

    size: tuple[int, int]
    since: float
    looks: deque[_Look] = field(default_factory=deque)


class Demand:
    """Watches the pools and says which should change by one worker.

    A pool grows after all its workers were busy, with more work at hand, for ``grow_after_s`` without a break, while
    the learner waited for a good part of that time, unless a worker is on its way. It shrinks when over
    ``shrink_after_s`` its work would have fitted into one worker less, those on their way included, and at no look it
    held the learner up. Every change of its size begins both anew.
    """

    def __init__(self, config: ElasticConfig) -> None:
        self._grow_s, self._shrink_s = config.grow_after_s, config.shrink_after_s
        self._pools: dict[str, _Watch] = {}

    def look(self, now: float, loads: Sequence[RoomLoad], learner_waits: float) -> dict[str, int]:
        """Room to +1 or -1; rooms that should stay as they are aren't named. ``now`` in seconds; ``learner_waits``: the
        share of the time since the last look in which the learner waited for rollouts."""
        wishes = {load.room: self._change(now, load, learner_waits) for load in loads}
        return {room: change for room, change in wishes.items() if change}

    def _change(self, now: float, load: RoomLoad, waits: float) -> int:
        pool, size = self._pools.get(load.room), (load.size, load.starting)
        if pool is None or pool.size != size:  # this look was, in part, at a pool of another size
            self._pools[load.room] = _Watch(size, now)
            return 0
        if load.size == 0:
            return 0
        full = load.busy_share >= _BUSY and load.num_calls > load.size
        pool.looks.append(_Look(now, load.busy_share * load.size, full, waits))
        while len(pool.looks) > 1 and pool.looks[1].at <= now - max(self._grow_s, self._shrink_s):
            pool.looks.popleft()
        whole = load.size + load.starting
        if not load.starting and whole < load.maximum and self._is_short(now, pool):
            change = 1
        elif whole > load.minimum and self._is_idle(now, pool, whole):
            change = -1
        else:
            return 0
        del self._pools[load.room]
        return change

    def _is_short(self, now: float, pool: _Watch) -> bool:
        full = list(takewhile(lambda look: look.full, reversed(pool.looks)))
        if not full or now - full[-1].at < self._grow_s:
            return False
        # The learner waits in one piece of each step, which may take longer than several looks.
        return fmean(look.waits for look in full if look.at >= now - self._grow_s) >= _STARVING

    def _is_idle(self, now: float, pool: _Watch, size: int) -> bool:
        held_up = (look.at for look in pool.looks if look.full and look.waits >= _STARVING)
        since = max(held_up, default=pool.since)
        busy = [look.busy for look in pool.looks if look.at > since and look.at >= now - self._shrink_s]
        return bool(busy) and now - since >= self._shrink_s and fmean(busy) <= (size - 1) * _FULL
