"""Pools that grow and shrink: who comes, who goes, and what becomes of their calls."""

import asyncio
import contextlib
import time

import pytest

from fake_ray import actor_of, until
from fake_workers import FakeGenerator
from supervised_rooms import asking, generators, supervised


def test_a_pool_that_grows_gets_workers_with_weights_and_the_others_notice_nothing():
    async def scenario(kept):
        old = kept.world.living("student-generator")[0].inside
        group = old.group
        kept.pool.target = 3
        await until(lambda: len(kept.ready()) == 3)
        assert kept.cast.log.count(("welcome", 0)) == 2
        assert old.group is group and kept.restarts.by_room == {}

    supervised(scenario, rollout=generators(1, 1, 3))


def test_a_pool_that_shrinks_lets_the_youngest_go_and_one_that_is_not_up_yet_first():
    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        kept.pool.target = 4
        await until(lambda: len(kept.pool) == 4)
        kept.pool.target = 3  # what works is of more use than what starts
        await until(lambda: len(kept.pool) == 3)
        assert len(kept.ready()) == 3 and kept.world.actors[-1].is_dead
        kept.pool.target = 1
        await until(lambda: len(kept.pool) == 1)
        assert kept.ready() == ["student-generator-0"]
        assert kept.restarts.by_room == {}, "who is let go is not lost"
        assert [kind for kind, _ in kept.said] == ["worker_leaves"] * 3

    supervised(scenario, rollout=generators(3, 1, 4))


def test_one_that_starts_is_let_go_at_once_and_that_is_no_death():
    """The bug: its start counted as a call to be finished, until a missed heartbeat counted as a death."""

    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        kept.pool.target = 2
        await until(lambda: len(kept.pool) == 2)
        kept.pool.target = 1
        await asyncio.sleep(5)
        assert len(kept.pool) == 1 and kept.world.actors[-1].is_dead
        assert kept.restarts.by_room == {}

    supervised(scenario, rollout=generators(1, 1, 2))


def test_one_that_is_told_to_leave_while_it_is_welcomed_does_not_come_to_work():
    async def scenario(kept):
        def before(actor, method):
            if method == "update_weights" and actor.name == "student-generator-1":
                actor.stop()

        kept.world.before = before
        kept.pool.target = 2
        await until(lambda: len(kept.world.actors) > 0 and not kept.world.actors[-1].moves.is_set())
        joiner, kept.pool.target = kept.pool.members[-1], 1
        await asyncio.sleep(5)
        assert joiner.state == "leaving"
        actor_of(joiner).go_on()
        await until(lambda: joiner.state == "gone")
        assert kept.ready() == ["student-generator-0"]
        assert joiner.ready_since is None and kept.restarts.by_room == {}

    supervised(scenario, rollout=generators(1, 1, 2))


def slow(takes_s):
    def prepare(cast):
        cast.generator = type("Slow", (FakeGenerator,), {"takes_s": takes_s})

    return prepare


def test_one_that_is_let_go_finishes_its_calls_first():
    async def scenario(kept):
        calls = asking(kept, 4)
        await asyncio.sleep(1)
        kept.pool.target = 1
        await until(lambda: kept.pool.those("leaving"))
        (leaving,) = kept.pool.those("leaving")
        assert leaving.num_calls == 2
        await asyncio.gather(*calls)
        await until(lambda: len(kept.pool) == 1)
        assert kept.pool.num_reissued == 0 and actor_of(leaving).is_dead

    supervised(scenario, prepare=slow(20.0), rollout=generators(2, 1, 2))


def test_what_is_not_finished_in_time_is_issued_again_elsewhere():
    async def scenario(kept):
        calls = asking(kept, 4)
        await asyncio.sleep(1)
        kept.pool.target = 1
        began = time.monotonic()
        await until(lambda: len(kept.pool) == 1, most=20_000)
        assert time.monotonic() - began == pytest.approx(120, abs=3)
        assert kept.pool.num_reissued == 2
        answers = await asyncio.gather(*calls)
        assert sorted(meta.slot for metas, _ in answers for meta in metas) == list(range(4))
        assert kept.restarts.by_room == {}

    supervised(scenario, prepare=slow(500.0), rollout=generators(2, 1, 2))


def test_demand_raises_a_pool_to_its_maximum_and_idleness_lowers_it_to_its_minimum():
    async def scenario(kept):
        kept.supervisor.learner_waited_s = time.monotonic  # it does nothing else
        calls = []
        for _ in range(60):
            calls = [call for call in calls if not call.done()]
            calls += asking(kept, 30 - len(calls))
            await asyncio.sleep(5)
        assert len(kept.ready()) == kept.pool.target == 4
        kept.supervisor.learner_waited_s = lambda: 0.0
        for call in calls:
            call.cancel()
        await asyncio.sleep(2000)
        assert len(kept.ready()) == kept.pool.target == 2
        resized = [text for kind, text in kept.said if kind == "pool_resized"]
        assert ["than its workers can" in text for text in resized] == [True] * 2 + [False] * 2

    supervised(scenario, prepare=slow(20.0), rollout=generators(2, 2, 4))


def test_a_pool_is_not_made_smaller_before_there_is_a_learner_that_waits():
    """The bug: while the first state was loaded, workers that nobody could need yet were given up."""

    async def scenario(kept):
        await asyncio.sleep(2000)
        assert len(kept.ready()) == kept.pool.target == 4
        kept.supervisor.learner_waited_s = lambda: 0.0
        await asyncio.sleep(2000)
        assert len(kept.ready()) == kept.pool.target == 2

    supervised(scenario, prepare=slow(20.0), rollout=generators(4, 2, 4))


@pytest.mark.slow
def test_pools_of_a_fixed_size_stay_as_they_are():
    async def scenario(kept):
        kept.supervisor.learner_waited_s = time.monotonic
        with contextlib.suppress(asyncio.CancelledError):
            calls = asking(kept, 400)
            await asyncio.sleep(300)
            assert len(kept.ready()) == 2
            for call in calls:
                call.cancel()
            await asyncio.sleep(2000)
            assert len(kept.ready()) == 2

    supervised(scenario, prepare=slow(20.0), rollout=generators(2))
