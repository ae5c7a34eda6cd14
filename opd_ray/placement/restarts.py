"""How many workers a room has lost, and how many it may."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from opd_ray.errors import RunError

_WINDOW_S = 1800.0
"""What is lost at longer intervals is the weather of spot nodes, and goes on for ever."""


class Restarts:
    """Counts lost workers by room, and says when there were too many."""

    def __init__(self, max_restarts: int, earlier: Mapping[str, int] = {}) -> None:
        self.by_room: Counter[str] = Counter(earlier)
        """Over the whole run, earlier starts of it included."""
        self._most = max_restarts
        self._recent: dict[str, deque[float]] = {}

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
