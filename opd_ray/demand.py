"""Demand: which pool should grow, and which can do with one worker less. Pure: loads in, wishes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.config import ElasticConfig

_STARVING = 0.2
"""Share of the time that the learner waits for rollouts from which more of them would help."""
_FULL = 0.8
"""Share of the time that one worker less may be busy; below ElasticConfig.busy_share, lest it asks to grow at once."""


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


class Demand:
    """Watches the pools and says which should change by one worker.

    A pool grows when it held the learner up, without a break, for ``grow_after_s``; it shrinks when its work would
    have fitted into one worker less for ``shrink_after_s``. Both clocks start anew when a pool changes its size.
    """

    def __init__(self, config: ElasticConfig) -> None:
        self._config = config
        self._full = min(_FULL, 0.9 * config.busy_share)
        self._short_since: dict[str, float] = {}
        self._idle_since: dict[str, float] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def look(self, now: float, loads: Sequence[RoomLoad], learner_waits: float) -> dict[str, int]:
        """Room to +1 or -1; rooms that should stay as they are aren't named. ``now`` in seconds; ``learner_waits``: the
        share of the time since the last look in which the learner waited for rollouts."""
        wishes = {}
        for load in loads:
            change = self._change(now, load, learner_waits)
            if change:
                wishes[load.room] = change
        return wishes

    def _change(self, now: float, load: RoomLoad, learner_waits: float) -> int:
        room, size = load.room, (load.size, load.starting)
        if self._sizes.get(room) != size:  # what was seen until now was seen of another pool
            self._sizes[room] = size
            self._restart(room)
        short = self._lasts(self._short_since, room, now, self._is_short(load, learner_waits))
        idle = self._lasts(self._idle_since, room, now, self._is_idle(load))
        change = 0
        if short >= self._config.grow_after_s and not load.starting and load.size < load.maximum:
            change = 1
        elif idle >= self._config.shrink_after_s and load.size > load.minimum:
            change = -1
        if change:
            self._restart(room)
        return change

    def _is_short(self, load: RoomLoad, learner_waits: float) -> bool:
        """Is it the bottleneck, and would another worker have something to do?"""
        busy = load.busy_share >= self._config.busy_share and load.num_calls > load.size
        return learner_waits >= _STARVING and load.size > 0 and busy

    def _is_idle(self, load: RoomLoad) -> bool:
        """Would its work have fitted into one worker less?"""
        return not load.starting and load.busy_share * load.size <= (load.size - 1) * self._full

    def _restart(self, room: str) -> None:
        self._short_since.pop(room, None)
        self._idle_since.pop(room, None)

    def _lasts(self, since: dict[str, float], room: str, now: float, holds: bool) -> float:
        """For how long it has held without a break; below 0 if it does not."""
        if not holds:
            since.pop(room, None)
            return -1.0
        return now - since.setdefault(room, now)
