"""Demand: pools grow where they hold the learner up, shrink where they idle, and do not flap."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from opd_ray.config import ElasticConfig
from opd_ray.placement.demand import Demand, RoomLoad

CONFIG = ElasticConfig(grow_after_s=15, shrink_after_s=60)


def load(size: int = 2, busy: float = 1.0, calls: int = 5, **changes: int) -> RoomLoad:
    values = {"starting": 0, "minimum": 1, "maximum": 4} | changes
    return RoomLoad(room="generate", size=size, busy_share=busy, num_calls=calls, **values)


def series(loads: Iterable[tuple[RoomLoad, float]], demand: Demand | None = None) -> list[tuple[float, int]]:
    """(time, change) of every wish in a look every 5 s; each of ``loads`` comes with the learner's waiting."""
    demand, wishes = demand or Demand(CONFIG), []
    for number, (each, waits) in enumerate(loads):
        for change in demand.look(5.0 * number, [each], waits).values():
            wishes.append((5.0 * number, change))
    return wishes


def test_a_bottleneck_gets_one_worker_after_its_time() -> None:
    # The first look is at a time of which nothing is known.
    assert series([(load(), 0.5)] * 5) == [(20.0, 1)]


def test_looks_need_not_fit_the_time_after_which_a_pool_grows() -> None:
    demand = Demand(ElasticConfig(grow_after_s=15, shrink_after_s=6))
    wishes = [demand.look(4.0 * number, [load()], 0.5) for number in range(6)]
    assert wishes == [{}] * 5 + [{"generate": 1}]


@pytest.mark.parametrize(
    ("each", "waits"),
    [
        (load(), 0.1),  # the learner has enough to do
        (load(busy=0.8), 0.9),  # it is another room that is slow
        (load(calls=2), 0.9),  # one more would have nothing to do
        (load(starting=1), 0.9),  # one is on its way
        (load(size=4), 0.9),  # there must not be more
        (load(size=0, starting=0, busy=0.0, calls=9), 1.0),  # replacing the dead is not a matter of demand
    ],
)
def test_what_is_not_the_bottleneck_or_cannot_grow_stays(each: RoomLoad, waits: float) -> None:
    assert series([(each, waits)] * 50) == []


def test_a_break_starts_the_time_anew() -> None:
    short, busy_elsewhere = (load(), 0.5), (load(busy=0.5), 0.5)
    assert series(([short] * 3 + [busy_elsewhere]) * 10) == []


def test_a_learner_that_waits_in_one_piece_of_every_step_starves_as_well() -> None:
    training, waiting = (load(), 0.0), (load(), 1.0)
    assert series([training, training, waiting] * 3)[0] == (20.0, 1)


def test_growth_goes_one_at_a_time_and_waits_for_the_worker() -> None:
    demand = Demand(CONFIG)
    sizes = [load()] * 5 + [load(starting=1)] * 20 + [load(size=3)] * 5
    assert series([(each, 0.5) for each in sizes], demand) == [(20.0, 1), (25 * 5.0 + 20.0, 1)]


def test_a_worker_that_finds_no_place_is_given_up_when_nobody_needs_it() -> None:
    """The bug: a pool with a worker on its way, which may be for ever, never gave one back."""
    needed, idle = load(starting=1), load(starting=1, busy=0.3, calls=0)
    assert series([(needed, 0.9)] * 50 + [(idle, 0.0)] * 50)[0] == (60.0 + 5 * 49.0, -1)
    assert series([(load(starting=1, busy=0.3, calls=0, minimum=3), 0.0)] * 50) == []
    busy = load(starting=1, busy=0.9, calls=2)
    assert series([(busy, 0.0)] * 50) == [], "without it the others would be full"


def test_an_idle_pool_gives_back_one_at_a_time_down_to_its_minimum() -> None:
    demand, size, sizes = Demand(CONFIG), 4, []
    for number in range(100):
        wish = demand.look(5.0 * number, [load(size=size, busy=0.4 / size, calls=0, minimum=2)], 0.0)
        size += wish.get("generate", 0)
        sizes.append(size)
    assert sizes[:12] == [4] * 12
    assert sizes[12] == 3
    assert sizes[24] == 3 and sizes[-1] == 2
    assert sorted(set(sizes)) == [2, 3, 4]


def test_a_pool_whose_work_does_not_fit_into_one_less_stays() -> None:
    assert series([(load(size=2, busy=0.5, calls=2), 0.0)] * 100) == []
    assert series([(load(size=1, busy=0.0, calls=0, minimum=1), 0.0)] * 100) == []


def test_idleness_is_a_mean_so_that_bursts_do_not_hide_it() -> None:
    burst, idle = (load(size=4, busy=1.0, calls=4), 0.0), (load(size=4, busy=0.1, calls=0), 0.0)
    assert series([burst, idle, idle] * 6)[0] == (60.0, -1)


def test_a_load_that_swings_between_too_much_and_nothing_changes_nothing() -> None:
    short, idle = (load(), 1.0), (load(busy=0.0, calls=0), 0.0)
    for period in (1, 2, 3):
        assert series(([short] * period + [idle] * period) * 50) == []


def test_rooms_are_judged_apart() -> None:
    demand, wishes = Demand(CONFIG), []
    scorer = RoomLoad("teacher", 1, 0, 1, 3, busy_share=1.0, num_calls=7)
    for number in range(13):
        wishes.append(demand.look(5.0 * number, [load(size=2, busy=0.1, calls=0), scorer], 0.6))
    assert wishes[4] == {"teacher": 1}
    assert wishes[12] == {"generate": -1}


class Simulation:
    """Calls of random lengths at a pool, one per worker at a time, started up in 20 s; those that are admitted are
    bounded as slots bound them, and a learner consumes the results at its own speed."""

    def __init__(self, size: int, mean_s: float, learner_s: float, seed: int) -> None:
        self.size, self.mean_s, self.learner_s = size, mean_s, learner_s
        self.coming: list[float] = []
        self.random = random.Random(seed)
        self.demand = Demand(CONFIG)
        self.running: list[float] = []
        self.queue, self.done, self.learning_s = 12, 0, 0.0

    def run(self, seconds: int) -> list[int]:
        """The pool's size at every look."""
        sizes, busy, waited = [], 0, 0
        for now in range(seconds):
            arrived = [each for each in self.coming if each <= now]
            self.coming = [each for each in self.coming if each > now]
            self.size += len(arrived)
            self.done += sum(left <= 1 for left in self.running)
            self.running = [left - 1 for left in self.running if left > 1]
            while self.queue and len(self.running) < self.size:
                self.queue -= 1
                self.running.append(self.mean_s * self.random.uniform(0.5, 1.5))
            busy += len(self.running)
            if self.learning_s <= 0 and self.done:
                self.done, self.learning_s, self.queue = self.done - 1, self.learning_s + self.learner_s, self.queue + 1
            waited += self.learning_s <= 0
            self.learning_s = max(self.learning_s - 1, min(self.learning_s, 0))
            if now % 5 == 4:
                calls = self.queue + len(self.running)
                seen = RoomLoad("generate", self.size, len(self.coming), 1, 8, min(1, busy / 5 / self.size), calls)
                change = self.demand.look(float(now), [seen], waited / 5).get("generate", 0)
                if change > 0:
                    self.coming.append(now + 20.0)
                elif change < 0:
                    self.size -= 1
                sizes.append(self.size + len(self.coming))
                busy = waited = 0
        return sizes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", [1, 8])
def test_a_pool_converges_to_what_the_learner_consumes(start: int, seed: int) -> None:
    """Calls of 16 s and a learner that takes 4 s for each need 4 workers, or one more for the noise."""
    sizes = Simulation(start, mean_s=16, learner_s=4, seed=seed).run(4000)
    settled = sizes[len(sizes) // 2 :]
    assert set(settled) <= {4, 5, 6}
    changes = sum(a != b for a, b in zip(settled, settled[1:], strict=False))
    assert changes <= 2


def test_a_pool_follows_the_load() -> None:
    simulation = Simulation(1, mean_s=16, learner_s=4, seed=0)
    assert simulation.run(1500)[-1] >= 4
    simulation.mean_s = 4
    assert simulation.run(1500)[-1] <= 2
