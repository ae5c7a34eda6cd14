"""Demand: which pool should grow, and which can do with one worker less. Pure: loads in, wishes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass
class _Watch:
    """What was seen of a pool since it changed its size."""

    size: tuple[int, int]
    full_since: float | None
    """Since when, without a break, all its workers had work and more of it waited."""
    since: float
    busy: deque[tuple[float, float]]
    """When it was looked at, and how many workers were busy on average; not beyond shrink_after_s, nor beyond the last
    time that it held the learner up."""


class Demand:
    """Watches the pools and says which should change by one worker.

    A pool grows after all its workers were busy, with more work at hand, for ``grow_after_s`` without a break, while
    the learner waited for a good part of that time, unless a worker is on its way. It shrinks when over
    ``shrink_after_s`` its work would have fitted into one worker less, those on their way included, and at no look it
    held the learner up. Every change of its size begins both anew.
    """

    def __init__(self, config: ElasticConfig) -> None:
        self._config = config
        self._pools: dict[str, _Watch] = {}
        self._waits: deque[tuple[float, float]] = deque()

    def look(self, now: float, loads: Sequence[RoomLoad], learner_waits: float) -> dict[str, int]:
        """Room to +1 or -1; rooms that should stay as they are aren't named. ``now`` in seconds; ``learner_waits``: the
        share of the time since the last look in which the learner waited for rollouts."""
        # The learner waits in one piece of each step, which may take longer than several looks.
        _append(self._waits, now, learner_waits, self._config.grow_after_s)
        wishes = {load.room: self._change(now, load, learner_waits) for load in loads}
        return {room: change for room, change in wishes.items() if change}

    def _change(self, now: float, load: RoomLoad, learner_waits: float) -> int:
        pool, size = self._pools.get(load.room), (load.size, load.starting)
        if pool is None or pool.size != size:  # this look was, in part, at a pool of another size
            self._pools[load.room] = _Watch(size, None, now, deque())
            return 0
        if load.size == 0:
            return 0
        config = self._config
        if load.busy_share < _BUSY or load.num_calls <= load.size:
            pool.full_since = None
        elif pool.full_since is None:
            pool.full_since = now
        _append(pool.busy, now, load.busy_share * load.size, config.shrink_after_s)
        if pool.full_since is not None and learner_waits >= _STARVING:
            pool.since = now
            pool.busy.clear()
        change = 0
        whole = load.size + load.starting
        if self._is_short(now, pool) and not load.starting and whole < load.maximum:
            change = 1
        elif self._is_idle(now, pool, whole) and whole > load.minimum:
            change = -1
        if change:
            del self._pools[load.room]
        return change

    def _is_short(self, now: float, pool: _Watch) -> bool:
        lasted = pool.full_since is not None and now - pool.full_since >= self._config.grow_after_s
        return lasted and _mean(self._waits) >= _STARVING

    def _is_idle(self, now: float, pool: _Watch, size: int) -> bool:
        lasted = bool(pool.busy) and now - pool.since >= self._config.shrink_after_s
        return lasted and _mean(pool.busy) <= (size - 1) * _FULL


def _append(looks: deque[tuple[float, float]], now: float, value: float, most_s: float) -> None:
    """Adds a look and forgets those that are older than ``most_s``."""
    looks.append((now, value))
    while looks[0][0] < now - most_s:
        looks.popleft()


def _mean(looks: deque[tuple[float, float]]) -> float:
    return sum(value for _, value in looks) / len(looks)
