"""Every tracker in a thread of its own: one that fails or hangs costs a run one warning, and nothing else."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from opd_ray.rooms.threads import start
from opd_ray.watch.trackers import TRACKERS, Tracked, Tracker

_MOST_WAITING = 10_000
"""Calls that a tracker may be behind."""


class Tracking:
    """The trackers of a run. Nothing here raises, and nothing waits for a tracker but ``begin`` and ``close``."""

    def __init__(self, run: Tracked, say: Callable[..., None], begin_s: float = 10.0, close_s: float = 40.0) -> None:
        """``say(kind, text, **fields)`` tells people what happened, also from other threads. ``begin_s`` and
        ``close_s``: how long is waited at most."""
        names = dict.fromkeys(run.config.metrics.trackers)
        self._lanes = [_Lane(name, partial(TRACKERS[name], run), say) for name in names]
        self._begin_s, self._close_s = begin_s, close_s

    def begin(self, step: int, *, continued: bool) -> None:
        """As Tracker.begin; waits for it, so that of a run that is killed early the first steps are there."""
        begun = [lane.put(lambda tracker: tracker.begin(step, continued=continued)) for lane in self._lanes]
        _wait(begun, self._begin_s)

    def log(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]]) -> None:
        for lane in self._lanes:
            lane.put(lambda tracker: tracker.log(step, metrics, said))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        for lane in self._lanes:
            lane.put(lambda tracker: tracker.summarise(summary))

    def close(self) -> None:
        closed = [lane.put(_close) for lane in self._lanes]
        _wait(closed, self._close_s)
        for lane, done in zip(self._lanes, closed, strict=True):
            if not done.is_set():
                lane.lose(f"has not taken everything in within {self._close_s:g} s of the end")


def _close(tracker: Tracker) -> None:
    tracker.close()


def _wait(events: Sequence[threading.Event], most_s: float) -> None:
    deadline = time.monotonic() + most_s
    for event in events:
        event.wait(max(0.0, deadline - time.monotonic()))


class _Lane:
    """One tracker in its thread, and what it has still to do."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[..., None]) -> None:
        self._name, self._say = name, say
        self._todo: deque[tuple[Callable[[Tracker], None], threading.Event]] = deque()
        self._changed, self._over = threading.Condition(), False
        start(self._work, make)

    def put(self, call: Callable[[Tracker], None]) -> threading.Event:
        """The event is set when the call is done, or will not be any more."""
        done = threading.Event()
        with self._changed:
            if self._over:
                done.set()
                return done
            self._todo.append((call, done))
            self._changed.notify()
            behind = len(self._todo)
        if behind > _MOST_WAITING:
            self.lose(f"is {behind} records behind")
        return done

    def lose(self, why: str) -> None:
        """Says, the first time, that the tracker is given up."""
        with self._changed:
            if self._over:
                return
            self._drop()
        text = f"tracker {self._name} {why}: the run goes on without it; metrics.jsonl has everything"
        self._say("tracker_lost", text, tracker=self._name)

    def _drop(self) -> None:
        """What waits is not done any more, and nothing that comes later is."""
        for _, done in self._todo:
            done.set()
        self._todo.clear()
        self._over = True
        self._changed.notify_all()

    def _work(self, make: Callable[[], Tracker]) -> None:
        call = None
        try:
            tracker = make()
            while call is not _close:
                with self._changed:
                    self._changed.wait_for(lambda: self._todo or self._over)
                    if self._over:
                        return
                    call, done = self._todo.popleft()
                try:
                    call(tracker)
                finally:
                    done.set()
        except Exception as error:
            self.lose(f"failed ({' '.join(str(error).split()) or type(error).__name__})")
        else:  # it is closed
            with self._changed:
                self._drop()
