"""The servers that score for one role: which of them is asked next, and which is no longer.

    in use    asked, the least busy first
    resting   gave no answer of use: left alone for a while, twice as long after each failure, then asked once
    out       its answers are another model's: not asked again in this run

Each actor sees for itself.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_ray.errors import RunError, ServerFailed, ServerRefused
from opd_ray.messages import ServerState
from opd_ray.score.server import Server

_FIRST_REST_S = 0.5
_LONGEST_REST_S = 30.0
_MEND = "mend them and go on with --resume"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the servers of a role were when the run began; the standing check goes by it."""

    models: Mapping[str, str]
    """By URL: the name of the model there."""
    probe: np.ndarray
    """[P] token ids: a fixed sequence that every server has scored."""
    answers: Mapping[str, np.ndarray]
    """By URL: [P - 1] log-probs of the probe's tokens but the first."""
    vocab_size: int
    chosen: bool
    """Do they give the log-probs of chosen tokens?"""
    allowed: float
    """The most that two answers of one model differ by in the mean, nats."""


@dataclass(eq=False)
class Replica:
    """One of the servers, and how it fares."""

    server: Server
    start: np.ndarray
    """[P - 1] its log-probs of the probe when the run began."""
    num_calls: int = 0
    """Requests under way."""
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    since: float = field(default_factory=time.monotonic)
    """When its state came about."""
    why: str = ""
    is_out: bool = False
    distance: float = 0.0

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def may_be_asked(self) -> bool:
        """One that failed gets a single request, which shows whether it is back."""
        return not self.is_out and (not self.failures or (not self.num_calls and time.monotonic() >= self.rests_until))

    def state(self) -> ServerState:
        name = "out" if self.is_out else "resting" if self.failures else "in use"
        return ServerState(self.url, name, time.monotonic() - self.since, self.why, self.distance)


class Replicas:
    """Hands requests to servers. Many threads may ask at once."""

    def __init__(self, replicas: Sequence[Replica], *, request_s: float) -> None:
        """``request_s``: how long a server may take for one request."""
        self._replicas, self._request_s = list(replicas), request_s
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def states(self) -> tuple[ServerState, ...]:
        with self._changed:
            return tuple(replica.state() for replica in self._replicas)

    def ask(self, call: Callable[[Server, float], Any], until: float) -> tuple[Replica, Any]:
        """What ``call(server, timeout_s)`` returns for the first that answers, and which that was.

        Raises RunError, with every URL, when there is none that answers by ``until``, and ServerRefused for a request
        that every server refuses.
        """
        refused: dict[Replica, ServerRefused] = {}
        while True:
            replica = self._take(until, refused)
            try:
                return replica, self.of(replica, call, until, taken=True)
            except ServerRefused as error:
                refused[replica] = error
            except ServerFailed:
                continue

    def of(self, replica: Replica, call: Callable[[Server, float], Any], until: float, *, taken: bool = False) -> Any:
        """The same of one server. Raises ServerFailed."""
        if not taken:
            with self._changed:
                replica.num_calls += 1
        try:
            answer = call(replica.server, max(0.1, min(self._request_s, until - time.monotonic())))
        except ServerRefused:
            raise
        except ServerFailed as error:
            self._rest(replica, str(error))
            raise
        else:
            self._works(replica)
            return answer
        finally:
            with self._changed:
                replica.num_calls -= 1
                self._changed.notify_all()

    def put_out(self, replica: Replica, why: str) -> None:
        """Its answers are another model's."""
        with self._changed:
            if not replica.is_out:
                replica.is_out, replica.why, replica.since = True, why, time.monotonic()
                _log.warning("%s; it is not asked any more", why)
            self._changed.notify_all()

    def note(self, replica: Replica, why: str) -> None:
        """Something is to be said of one that stays in use."""
        with self._changed:
            if not replica.why:
                replica.why = why
                _log.warning("%s", why)

    def usable(self) -> list[Replica]:
        with self._changed:
            return [replica for replica in self._replicas if replica.may_be_asked]

    def _take(self, until: float, refused: Mapping[Replica, ServerRefused]) -> Replica:
        """The least busy of those that may be asked; one more request is then under way there."""
        with self._changed:
            while True:
                now = time.monotonic()
                if all(replica.is_out for replica in self._replicas):
                    raise RunError(f"no server is what it was when the run began: {self._said()}; {_MEND}")
                if now >= until:
                    raise RunError(f"no scores in time (deadlines.score_s): {self._said()}; {_MEND}")
                asked = [replica for replica in self._replicas if replica.may_be_asked and replica not in refused]
                if asked:
                    replica = min(asked, key=lambda each: each.num_calls)
                    replica.num_calls += 1
                    return replica
                if refused and all(each in refused for each in self._replicas if not each.is_out and not each.failures):
                    raise next(iter(refused.values()))
                rests = [each.rests_until for each in self._replicas if not each.is_out and each.rests_until > now]
                self._changed.wait(min([*rests, until]) - now)

    def _rest(self, replica: Replica, why: str) -> None:
        with self._changed:
            now = time.monotonic()
            if now < replica.rests_until:
                return  # of many requests that failed at once only the first counts
            if not replica.failures:
                replica.since = now
                _log.warning("%s", why)
            rest = min(_LONGEST_REST_S, _FIRST_REST_S * 2**replica.failures)
            replica.failures, replica.why = replica.failures + 1, why
            # Not all actors at once, lest a server that comes back is met by a crowd.
            replica.rests_until = now + rest * random.uniform(0.5, 1.0)

    def _works(self, replica: Replica) -> None:
        with self._changed:
            if replica.failures and not replica.is_out:
                _log.warning("%s answers again", replica.url)
                replica.failures, replica.rests_until, replica.why, replica.since = 0, 0.0, "", time.monotonic()

    def _said(self) -> str:
        """Each of them with what is wrong with it."""
        now = time.monotonic()
        return "; ".join(
            f"{each.why} (since {now - each.since:.0f} s)" if each.why else f"{each.url}: answers, but not fast enough"
            for each in self._replicas
        )
