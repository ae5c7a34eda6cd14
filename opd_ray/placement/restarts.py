"""How many workers a room has lost, and how many it may."""

from __future__ import annotations

from collections import Counter, deque

from opd_ray.config import RecoveryConfig
from opd_ray.errors import GroupLost, RunError

_WINDOW_S = 1800.0
"""What is lost at longer intervals is the weather of spot nodes, and goes on for ever."""

_MOST_IN_VAIN = 5
"""Losses of a group in a row without a step beyond those before."""


class Restarts:
    """Counts lost workers by room, and says when there were too many."""

    def __init__(self, config: RecoveryConfig, by_room: Counter[str] | None = None) -> None:
        """``by_room`` goes on counting what earlier starts of the run have lost."""
        self._most, self._below_min_s = config.max_restarts, config.below_min_s
        self.by_room: Counter[str] = Counter() if by_room is None else by_room
        self._recent: dict[str, deque[float]] = {}
        self._down_since: dict[str, float] = {}
        self._lost_at: dict[str, tuple[int, int]] = {}
        """By group: the furthest step at which it was lost, and how often it was without getting beyond that."""

    def count(self, room: str, cause: str, now: float) -> str:
        """Notes a loss and returns "n of most"; raises RunError at the first that is one too many."""
        recent = self._recent.setdefault(room, deque())
        while recent and recent[0] < now - _WINDOW_S:
            recent.popleft()
        if len(recent) >= self._most:
            raise RunError(
                f"{room}: {len(recent) + 1} workers were lost within {_WINDOW_S:g} s, and recovery.max_restarts "
                f"is {self._most}; the last: {cause}; mend the cause and go on with --resume"
            )
        recent.append(now)
        self.by_room[room] += 1
        return f"restart {len(recent)} of {self._most}"

    def count_group(self, error: GroupLost, now: float, *, was_up: bool, step: int) -> str:
        """The same for a group that was lost at ``step``, and which has to become whole and get further in time."""
        room = error.room
        since = self._down_since.setdefault(room, now) if not was_up else now
        if now - since > self._below_min_s:
            raise RunError(
                f"{room}: was not whole for more than {self._below_min_s:g} s (recovery.below_min_s); the last loss: "
                f"{error}; see that the cluster has a place for it, and go on with --resume"
            ) from error
        self._down_since[room] = since
        furthest, losses = self._lost_at.get(room, (-1, 0))
        losses = 1 if step > furthest else losses + 1
        self._lost_at[room] = (max(furthest, step), losses)
        if losses > _MOST_IN_VAIN:
            raise RunError(
                f"{room}: was lost {losses} times without getting beyond step {furthest}; the last: {error}; "
                "mend the cause and go on with --resume"
            ) from error
        return self.count(room, str(error), now)
