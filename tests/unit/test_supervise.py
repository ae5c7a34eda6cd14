"""The supervisor: replacements and their limits, starting, minimum, heartbeats."""

import asyncio
import time
from collections import Counter
from unittest import mock

import pytest

import fake_ray
from driven_run import cast_of
from fake_ray import actor_of, until
from fake_workers import FakeGenerator
from opd_ray.config import RecoveryConfig
from opd_ray.errors import GroupLost, RunError, StartFailed
from opd_ray.placement.restarts import Restarts
from supervised_rooms import Kept, asking, generators, supervised

# ---- replacement ----


def test_a_dead_worker_is_replaced_by_one_with_the_current_weights():
    async def scenario(kept):
        first, _ = kept.world.living("student-generator")
        kept.pool.lose(kept.pool.members[0], "its node went")
        await until(lambda: kept.ready() == ["student-generator-1", "student-generator-2"])
        assert first.is_dead
        newcomer = kept.world.named("student-generator-2").inside
        assert newcomer.version == 0 and newcomer.group is not None
        assert kept.cast.log.count(("welcome", 0)) == 1
        assert kept.restarts.by_room == {"generate": 1}
        ((kind, text),) = [each for each in kept.said if each[0] == "worker_lost"]
        assert "its node went" in text and "restart 1 of 20" in text

    supervised(scenario, rollout=generators(2))


def test_scorers_and_the_recorder_are_replaced_too():
    async def scenario(kept):
        for pool in (kept.rooms.scorers["teacher"], kept.rooms.recorder):
            pool.lose(pool.members[0], "its node went")
            await until(lambda pool=pool: len(pool.those("ready")) == 1)
        assert kept.restarts.by_room == {"teacher": 1, "record": 1}

    supervised(scenario)


async def one_that_starts(kept):
    """The successor of the pool's only generator, which does not come up; those after it do."""
    kept.world.starting = lambda actor: actor.may_start.clear()
    kept.pool.lose(kept.pool.members[0], "its node went")
    await until(lambda: len(kept.world.living("student-generator")) == 1)
    kept.world.starting = lambda actor: None
    return kept.world.living("student-generator")[0]


def test_one_that_dies_while_it_starts_is_replaced():
    async def scenario(kept):
        (await one_that_starts(kept)).die()
        await until(lambda: len(kept.ready()) == 1)
        assert kept.restarts.by_room == {"generate": 2}

    supervised(scenario)


def test_one_that_always_dies_while_it_starts_is_not_replaced_for_ever():
    """The bug: Ray says "The actor never ran" of a constructor that crashed, too, and that text made it no loss."""

    started = []

    async def scenario(kept):
        def starting(actor):
            started.append(actor.name)
            actor.die("a segmentation fault in its constructor")

        kept.world.starting = starting
        kept.pool.lose(kept.pool.members[0], "its node went")
        await asyncio.sleep(10_000)

    failure = supervised(scenario, fails=RunError, recovery={"max_restarts": 3})
    assert "generate: 4 workers were lost" in str(failure) and len(started) == 3


def test_one_whose_node_goes_before_it_ran_is_no_loss():
    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        kept.pool.lose(kept.pool.members[0], "its node went")
        for _ in range(5):
            await asyncio.sleep(2)
            kept.world.living("student-generator")[0].die(with_its_node=True)
        kept.world.starting = lambda actor: None
        await until(lambda: kept.ready() == ["student-generator-6"])
        assert kept.restarts.by_room == {"generate": 1}

    supervised(scenario)


def test_one_that_dies_while_it_is_welcomed_is_replaced():
    async def scenario(kept):
        def before(actor, method):
            if method == "connect" and actor.name == "student-generator-1":
                actor.die()

        kept.world.before = before
        kept.pool.lose(kept.pool.members[0], "its node went")
        await until(lambda: kept.ready() == ["student-generator-2"], most=20_000)
        assert kept.restarts.by_room == {"generate": 2}

    supervised(scenario)


def test_more_losses_in_the_window_than_allowed_end_the_run():
    async def scenario(kept):
        for _ in range(3):
            kept.pool.lose(kept.pool.members[0], "its node went")
            await until(lambda: len(kept.ready()) == 1)
            await asyncio.sleep(10)
        kept.pool.lose(kept.pool.members[0], "its node went again")
        await asyncio.sleep(10_000)

    failure = supervised(scenario, fails=RunError, recovery={"max_restarts": 3})
    assert "generate: 4 workers were lost within 1800 s, and recovery.max_restarts is 3" in str(failure)
    assert "the last: its node went again" in str(failure) and "--resume" in str(failure)


@pytest.mark.slow
def test_losses_that_lie_further_apart_than_the_window_go_on_for_ever():
    async def scenario(kept):
        for _ in range(12):
            kept.pool.lose(kept.pool.members[0], "its node went")
            await until(lambda: len(kept.ready()) == 1)
            await asyncio.sleep(700)
        assert kept.restarts.by_room == {"generate": 12}

    supervised(scenario, recovery={"max_restarts": 3})


def test_a_limit_of_none_ends_the_run_with_the_first_death():
    async def scenario(kept):
        kept.pool.lose(kept.pool.members[0], "its node went")
        await asyncio.sleep(10_000)

    assert "its node went" in str(supervised(scenario, fails=RunError, recovery={"max_restarts": 0}))


def test_restarts_of_earlier_starts_of_the_run_are_counted_and_not_limited():
    restarts = Restarts(RecoveryConfig(max_restarts=2), Counter(generate=40))
    assert restarts.count("generate", "gone", 0.0) == "restart 1 of 2"
    assert restarts.count("generate", "gone", 1.0) == "restart 2 of 2"
    assert restarts.count("teacher", "gone", 2.0) == "restart 1 of 2", "each room has its own limit"
    assert restarts.by_room == {"generate": 42, "teacher": 1}
    with pytest.raises(RunError, match="generate: 3 workers"):
        restarts.count("generate", "gone", 1799.0)
    assert restarts.count("generate", "gone", 1800.5) == "restart 2 of 2", "the first is out of the window"


# ---- starting ----


def broken_at_first(cast, times):
    """Generators whose first ``times`` cannot start."""
    made = []

    class Broken(FakeGenerator):
        def __init__(self, actor, *more):
            made.append(actor.name)
            if len(made) <= times:
                raise OSError("no such model")
            super().__init__(actor, *more)

    cast.generator = Broken


def test_a_worker_that_cannot_start_before_any_was_up_ends_the_run():
    """Another would fail in the same way, and twenty would take an hour to say so."""

    async def scenario(kept):
        await asyncio.sleep(10_000)

    failure = supervised(scenario, fails=StartFailed, sent=False, prepare=lambda cast: broken_at_first(cast, 99))
    assert "student-generator-0" in str(failure) and "no such model" in str(failure)


def test_a_worker_that_cannot_start_later_counts_as_a_loss():
    async def scenario(kept):
        def starting(actor):
            if actor.name in ("student-generator-1", "student-generator-2"):
                actor.refuse("the disk is full")

        kept.world.starting = starting
        kept.pool.lose(kept.pool.members[0], "its node went")
        await until(lambda: kept.ready() == ["student-generator-3"])
        assert kept.restarts.by_room == {"generate": 3}
        assert "the disk is full" in kept.said[-1][1]

    supervised(scenario)


def test_a_worker_for_which_there_is_no_place_is_asked_for_again_and_is_no_death():
    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        kept.pool.lose(kept.pool.members[0], "its node went")
        await asyncio.sleep(250)
        assert len(kept.world.living("student-generator")) == 1
        kept.world.starting = lambda actor: None
        await until(lambda: len(kept.ready()) == 1, most=20_000)
        assert kept.restarts.by_room == {"generate": 1}

    supervised(scenario, deadlines={"start_s": 100}, recovery={"below_min_s": 5000})


def test_a_pool_that_does_not_come_up_ends_the_wait_with_what_it_waits_for():
    async def scenario(kept):
        kept.pool.last_loss = "generate: student-generator-0 died"
        for pool in kept.rooms.pools:
            await pool.up(10)
        for member in list(kept.pool.members):
            kept.pool.end(member)
        kept.world.starting = lambda actor: actor.may_start.clear()
        with pytest.raises(RunError, match="generate: 0 of at least 1 workers came up within 70 s") as caught:
            await kept.supervisor.wait_for_minimum(70)
        assert "student-generator-0 died" in str(caught.value)

    supervised(scenario, sent=False)


# ---- minimum ----


def test_a_pool_below_its_minimum_for_too_long_ends_the_run():
    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        began = time.monotonic()
        kept.pool.lose(kept.pool.members[0], "its node went")
        await asyncio.sleep(290)
        assert kept.supervisor.below_min_s("generate") == pytest.approx(time.monotonic() - began, abs=3)
        await asyncio.sleep(100_000)

    sections = {"rollout": generators(3, 3, 3), "recovery": {"below_min_s": 300}, "deadlines": {"start_s": 9000}}
    failure = supervised(scenario, fails=RunError, **sections)
    assert "generate: has 2 workers, fewer than its minimum of 3, for more than 300 s" in str(failure)
    assert "the last loss: its node went" in str(failure) and "--resume" in str(failure)


def test_a_pool_that_comes_back_in_time_goes_on():
    async def scenario(kept):
        for _ in range(4):
            kept.world.starting = lambda actor: actor.may_start.clear()
            kept.pool.lose(kept.pool.members[0], "its node went")
            await asyncio.sleep(250)
            kept.world.living("student-generator")[-1].may_start.set()
            await until(lambda: len(kept.ready()) == 1)
            await asyncio.sleep(5)
            assert kept.supervisor.below_min_s("generate") is None

    supervised(scenario, recovery={"below_min_s": 300}, deadlines={"start_s": 9000})


def test_a_pool_above_its_minimum_may_miss_workers_for_as_long_as_it_likes():
    async def scenario(kept):
        kept.world.starting = lambda actor: actor.may_start.clear()
        kept.pool.lose(kept.pool.members[0], "its node went")
        await asyncio.sleep(5000)
        assert kept.supervisor.below_min_s("generate") is None

    supervised(scenario, rollout=generators(2, 1, 2), recovery={"below_min_s": 300}, deadlines={"start_s": 9000})


# ---- heartbeats ----


def test_a_silent_worker_of_a_pool_is_lost_and_replaced_though_nobody_asks_it_anything():
    async def scenario(kept):
        kept.world.actors[0].stop()
        began = time.monotonic()
        await until(lambda: kept.ready() == ["student-generator-1"], most=20_000)
        assert kept.world.actors[0].is_dead
        assert time.monotonic() - began < 60 * 1.3 + 1
        assert "heartbeat gave no answer within 60 s" in kept.pool.last_loss

    supervised(scenario, recovery={"heartbeat_s": 60})


@pytest.mark.parametrize("room", ["learn", "reference"])
def test_a_silent_member_of_a_group_is_the_group_s_loss(room):
    async def scenario(kept):
        role = {"learn": "learner", "reference": "reference-scorer"}[room]
        kept.world.living(role)[0].stop()
        await asyncio.sleep(1000)

    following = {"reference": {"update": "periodic"}, "loss": {"reference": {"coef": 0.1}}}
    failure = supervised(scenario, fails=GroupLost, recovery={"heartbeat_s": 60}, **following)
    assert failure.room == room and "heartbeat" in str(failure)


def test_one_that_is_stopped_for_less_than_the_limit_is_not_lost():
    async def scenario(kept):
        for _ in range(5):
            kept.world.actors[0].stop()
            await asyncio.sleep(40)
            kept.world.actors[0].go_on()
            await asyncio.sleep(40)
        assert kept.ready() == ["student-generator-0"]

    supervised(scenario, recovery={"heartbeat_s": 60})


def test_without_heartbeats_a_silent_worker_is_left_to_the_deadlines_of_its_calls():
    async def scenario(kept):
        kept.world.actors[0].stop()
        await asyncio.sleep(5000)
        assert kept.ready() == ["student-generator-0"]

    supervised(scenario, recovery={"heartbeat_s": 0})


# ---- nodes whose end is announced ----


def slow(takes_s):
    def prepare(cast):
        cast.generator = type("Slow", (FakeGenerator,), {"takes_s": takes_s})

    return prepare


def test_a_worker_whose_node_is_about_to_go_finishes_its_calls_while_another_takes_its_place():
    async def scenario(kept):
        calls = asking(kept, 4)
        await asyncio.sleep(1)
        going = kept.pool.members[0]
        actor_of(going).announce(60)
        await until(lambda: "student-generator-2" in kept.ready())
        assert going.state == "leaving" and going.num_calls == 2, "there are three, and one gets nothing new"
        await asyncio.gather(*calls)
        await until(lambda: going.state == "gone")
        assert kept.ready() == ["student-generator-1", "student-generator-2"]
        await asyncio.sleep(100)
        assert kept.pool.num_reissued == 0 and kept.restarts.by_room == {}
        ((kind, text),) = kept.said
        assert kind == "worker_leaves" and ": its node goes in 5" in text and text.endswith("another takes its place")

    supervised(scenario, prepare=slow(20.0), rollout=generators(2))


def test_calls_that_its_node_does_not_leave_time_for_go_elsewhere_just_before_and_are_no_loss():
    async def scenario(kept):
        calls = asking(kept, 4)
        await asyncio.sleep(1)
        actor_of(kept.pool.members[0]).announce(60)
        await asyncio.gather(*calls)
        assert kept.pool.num_reissued == 2
        assert kept.restarts.by_room == {} and {kind for kind, _ in kept.said} == {"worker_leaves"}

    supervised(scenario, prepare=slow(500.0), rollout=generators(2))


def test_where_no_time_is_said_a_worker_may_finish_whatever_it_has():
    async def scenario(kept):
        calls = asking(kept, 2)
        await asyncio.sleep(1)
        for member in kept.pool.members:
            actor_of(member).ends_at = float("inf")
        await asyncio.gather(*calls)
        assert kept.pool.num_reissued == 0

    supervised(scenario, prepare=slow(500.0), rollout=generators(2))


def test_one_that_still_starts_on_a_node_that_goes_starts_elsewhere_at_once():
    async def scenario(kept):
        (await one_that_starts(kept)).announce(1000)
        began = time.monotonic()
        await until(lambda: kept.ready() == ["student-generator-2"])
        assert time.monotonic() - began < 10 and kept.restarts.by_room == {"generate": 1}

    supervised(scenario)


def test_scorers_move_as_well_and_the_recorder_stays_with_its_driver():
    async def scenario(kept):
        for pool in (kept.rooms.scorers["teacher"], kept.rooms.recorder):
            actor_of(pool.members[0]).ends_at = time.monotonic() + 1000
        await until(
            lambda: [each.name for each in kept.rooms.scorers["teacher"].those("ready")] == ["teacher-scorer-1"]
        )
        await asyncio.sleep(10)
        assert [each.name for each in kept.rooms.recorder.members] == ["recorder-0"]

    supervised(scenario)


def test_the_state_of_a_learner_whose_node_is_about_to_go_is_saved_once():
    async def scenario(kept):
        for rank in kept.rooms.learner.members:
            actor_of(rank).ends_at = time.monotonic() + 100
        await asyncio.sleep(50)
        assert kept.saved == 1
        assert [kind for kind, _ in kept.said] == ["node_leaves"] * 2
        assert "learn: learner-0 on node-of-learner-0 is about to be lost: its node goes in 9" in kept.said[0][1]

    supervised(scenario, learner={"num_ranks": 2})


def test_a_head_that_does_not_say_which_nodes_go_is_asked_again():
    async def scenario(kept):
        asked = []

        def ends_of(handles):
            asked.append(handles)
            if len(asked) < 4:
                raise RuntimeError("failed to connect to GCS")
            return [0.0 if handle is kept.pool.members[0].handle else None for handle in handles]

        with mock.patch("opd_ray.placement.nodes.ends_of", ends_of):
            await until(lambda: kept.ready() == ["student-generator-1"])
        assert len(asked) >= 4

    supervised(scenario)


# ---- afterwards ----


def test_when_it_is_over_a_loss_is_the_caller_s_again():
    async def whole():
        kept = Kept(cast_of())
        task = asyncio.create_task(kept.supervisor.run())
        await until(lambda: all(pool.on_loss for pool in kept.rooms.pools))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [pool.on_loss for pool in kept.rooms.pools] == [None] * 3

    fake_ray.run(whole())
