"""The standing check of servers that score: does each still have the model that it had when the run began?

    probe            a fixed sequence that every server scored at the start; one that departs from its own answer is out
    second opinion   a sequence that one server has just scored, from another: long, and of what the run is about;
                     where the two differ, the probe or else a third server says which is to be believed

Both are asked for after every call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial

import numpy as np

from opd_ray.errors import ServerFailed
from opd_ray.score.replicas import Replica, Replicas
from opd_ray.score.server import Server

Opinion = Callable[[Server, float], np.ndarray]
"""Asks a server, for so many seconds at most, for its log-probs [T] of a sequence."""


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of log-probs, nats; infinite where only one says that a token is impossible."""
    with np.errstate(invalid="ignore"):
        return float(np.where(one == other, 0.0, np.abs(one - other)).mean()) if len(one) else 0.0


def probe_opinion(probe: np.ndarray) -> Opinion:
    """Log-probs of the probe's tokens but the first."""
    return lambda server, timeout_s: server.alternatives(probe, 1, 0, timeout_s)[0][:, 0]


class StandingCheck:
    """Looks at servers after they have scored."""

    def __init__(self, replicas: Replicas, probe: np.ndarray, allowed: float, threads: Executor) -> None:
        """``allowed``: the most that two answers of one model differ by in the mean, nats."""
        self._replicas, self._probe, self._allowed, self._threads = replicas, probe_opinion(probe), allowed, threads
        self._turns = itertools.count()

    def sound(
        self, scored: Iterable[Replica], first: Replica, own: np.ndarray, opinion: Opinion, until: float
    ) -> set[Replica]:
        """Those of the servers that have just ``scored`` which still have their model; puts the others out.

        ``own`` are ``first``'s log-probs [T] of a sequence, ``opinion`` asks another server for the same. One that
        gives no answer to the probe is not among them, but is not put out either.
        """
        scored, second = set(scored), self._other_than(first)
        theirs = None if second is None else self._ask(second, opinion, until)
        looked_at = sorted(scored | ({second} if theirs is not None else set()), key=lambda each: each.url)
        answers = self._threads.map(partial(self._passes_probe, until=until), looked_at)
        sound = {replica for replica, passes in zip(looked_at, answers, strict=True) if passes}
        if theirs is not None and {first, second} <= sound:
            sound -= self._settled((first, own), (second, theirs), opinion, until)
        return sound & scored

    def _other_than(self, *these: Replica) -> Replica | None:
        """One that may be asked, each in its turn."""
        others = [replica for replica in self._replicas.usable() if replica not in these]
        return others[next(self._turns) % len(others)] if others else None

    def _ask(self, replica: Replica, opinion: Opinion, until: float) -> np.ndarray | None:
        try:
            return self._replicas.of(replica, opinion, until)
        except ServerFailed:
            return None

    def _passes_probe(self, replica: Replica, until: float) -> bool:
        if (answer := self._ask(replica, self._probe, until)) is None:
            return False
        replica.distance = far = distance(answer, replica.start)
        if far > self._allowed:
            self._replicas.put_out(
                replica,
                f"{replica.url} answers as another model: its log-probs of the probe are {far:.3g} nats in the mean "
                f"from those at the start of the run, and {self._allowed:.3g} are allowed (url_drift_nats)",
            )
        return far <= self._allowed

    def _settled(
        self, first: tuple[Replica, np.ndarray], second: tuple[Replica, np.ndarray], opinion: Opinion, until: float
    ) -> set[Replica]:
        """Which of two servers, both of which pass the probe, is put out for what it says of a sequence."""
        (one, its), (other, theirs) = first, second
        far = distance(its, theirs)
        one.distance, other.distance = max(one.distance, far), max(other.distance, far)
        if far <= self._allowed:
            return set()
        third = self._other_than(one, other)
        opinion_of_third = None if third is None else self._ask(third, opinion, until)
        if opinion_of_third is not None:
            alone = [
                (replica, distance(answer, opinion_of_third))
                for replica, answer in (first, second)
                if distance(answer, opinion_of_third) > self._allowed
            ]
            if len(alone) == 1:
                replica, far = alone[0]
                self._replicas.put_out(
                    replica,
                    f"{replica.url} answers as another model: its log-probs of a sequence are {far:.3g} nats in the "
                    f"mean from those of two others, and {self._allowed:.3g} are allowed (url_drift_nats)",
                )
                return {replica}
        self._replicas.note(
            one,
            f"{one.url} and {other.url} differ by {far:.3g} nats in the mean on a sequence, and {self._allowed:.3g} "
            "are allowed (url_drift_nats), though both score the probe as they did; nobody says which is right",
        )
        return set()
