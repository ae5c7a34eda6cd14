"""What rooms make of the ways in which an actor can fail, and how pools hand out work."""

import asyncio

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

import fake_ray
from fake_ray import actor_of, until
from held_actors import DEADLINE_S, Losses, desks, held
from opd_ray.errors import (
    ActorError,
    EngineFailed,
    MemberLost,
    PayloadLost,
    RunError,
    StartFailed,
    WeightSyncError,
)
from opd_ray.rooms.room import _death, explained

# ---- what a failure means ----


def test_an_actor_that_cannot_start_is_explained_by_the_last_line_of_its_traceback():
    """The bug: the whole remote traceback stood in the one line that a user gets."""

    class Failed(RayActorError):
        actor_init_failed = True

        def __str__(self):
            return "The actor died of an error in its creation task\n  File 'x'\nOSError: no such model\n"

    assert _death(Failed()) == "the actor could not start: OSError: no such model"


def test_an_actor_that_dies_later_keeps_rays_explanation_in_one_line():
    text = _death(ActorDiedError())
    assert text.startswith("the actor died: ")
    assert "\n" not in text


def task_error(cause):
    return RayTaskError("work", f"Traceback:\n{cause!r}", cause, "python", 1, "host").as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ActorDiedError(), MemberLost),
        (ActorUnavailableError("no connection", None), MemberLost),
        (RayActorError(error_msg="no such model", actor_init_failed=True), StartFailed),
        (task_error(EngineFailed("the device is gone")), MemberLost),
        (task_error(OutOfMemoryError("killed")), MemberLost),
        (OutOfMemoryError("killed"), MemberLost),
        (task_error(ActorDiedError()), MemberLost),
        (task_error(ObjectLostError("00" * 28, "", "")), PayloadLost),
        (task_error(OwnerDiedError("00" * 28, "", "")), PayloadLost),
        (ObjectLostError("00" * 28, "", ""), PayloadLost),
        (task_error(WeightSyncError("no sign of life")), WeightSyncError),
        (task_error(RunError("rollout 3-0 has no topk_ids")), ActorError),
        (task_error(ValueError("bad")), ActorError),
        (WorkerCrashedError(), ActorError),
    ],
)
def test_each_failure_of_a_call_has_its_own_error(error, kind):
    found = explained("desk: clerk-0 on node-a, work()", error)
    assert type(found) is kind
    assert str(found).startswith("desk: clerk-0 on node-a, work()")
    assert "\n" not in str(found) or kind is ActorError


# ---- pools ----


def test_a_call_goes_to_the_worker_with_the_least_to_do():
    async def scenario():
        world, pool = await desks(3)
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(6)]
        await until(lambda: sum(len(actor.inside.asked) for actor in world.living()) == 6)
        assert [member.num_calls for member in pool.members] == [2, 2, 2]
        assert pool.num_calls == 6
        for actor in world.living():
            actor.inside.may_answer.set()
        answers = await asyncio.gather(*calls)
        assert sorted(what for (_, what), _ in answers) == list(range(6))
        assert [world.objects.get(payload) for _, payload in answers] == [f"payload of {i}" for i in range(6)]
        assert (pool.num_calls, pool.calls_done) == (0, 6 + 3)

    fake_ray.run(scenario())


def test_a_call_whose_worker_dies_goes_to_another():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool, replaces=False)
        first, second = world.actors
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(2)]
        await until(lambda: first.inside.asked and second.inside.asked)
        second.inside.may_answer.set()
        first.die()
        answers = await asyncio.gather(*calls)
        assert [answer for answer, _ in answers] == [("clerk-1", 0), ("clerk-1", 1)]
        assert [name for name, _ in losses.lost] == ["clerk-0"]
        assert "clerk-0 on node-of-clerk-0, work(): the actor died" in pool.last_loss
        assert pool.num_reissued == 1 and len(pool) == 1

    fake_ray.run(scenario())


def test_a_loss_that_many_calls_notice_is_one_loss():
    async def scenario():
        world, pool = await desks(2, calls_at_once=2)
        losses = Losses(pool)
        held(pool, world)
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(8)]
        await until(lambda: pool.num_calls == 8 and all(len(actor.inside.asked) == 4 for actor in world.living()))
        world.actors[0].die()
        world.actors[1].inside.may_answer.set()
        await asyncio.gather(*calls)
        assert len(losses.lost) == 1
        assert pool.num_reissued == 4

    fake_ray.run(scenario())


def test_calls_wait_while_no_worker_is_ready_and_go_on_when_one_is_admitted():
    async def scenario():
        world, pool = await desks(1)
        Losses(pool, replaces=False)
        pool.lose(pool.members[0], "its node went")
        calls = [asyncio.create_task(pool.call("tell", number, payload=False)) for number in range(3)]
        await asyncio.sleep(1000)
        assert (pool.num_waiting, pool.num_calls) == (3, 3)
        assert not any(call.done() for call in calls)
        member = pool.grow()
        await asyncio.sleep(1)
        assert pool.num_waiting == 3, "it has not started"
        await pool.bring_up(member, DEADLINE_S)
        assert await asyncio.gather(*calls) == [("clerk-1", 0), ("clerk-1", 1), ("clerk-1", 2)]
        assert pool.num_waiting == 0

    fake_ray.run(scenario())


def test_a_call_that_is_given_up_while_it_waits_leaves_nothing_behind():
    async def scenario():
        _, pool = await desks(1)
        Losses(pool, replaces=False)
        pool.lose(pool.members[0], "its node went")
        call = asyncio.create_task(pool.call("work", 0))
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.sleep(0)
        assert pool.num_waiting == 0

    fake_ray.run(scenario())


def test_a_call_that_takes_down_five_workers_is_held_to_be_the_cause():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool)

        def before(actor, method):
            if method == "work":
                actor.die("killed by the kernel")

        world.before = before
        with pytest.raises(ActorError, match="desk: one call took down 5 workers, the last: desk: clerk-") as caught:
            await pool.call("work", "poison")
        assert not isinstance(caught.value, MemberLost)
        assert len(losses.lost) == 5
        world.before = lambda *_: None
        await until(lambda: len(pool.those("ready")) == 2)
        assert (await pool.call("tell", "harmless", payload=False))[1] == "harmless"

    fake_ray.run(scenario())


def test_a_worker_that_gives_no_answer_by_the_deadline_is_lost_and_ended():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool, replaces=False)
        first, second = world.actors
        first.stop()
        began = asyncio.get_running_loop().time()
        answer, _ = await pool.call("work", 0)
        assert answer == ("clerk-1", 0)
        assert asyncio.get_running_loop().time() - began == pytest.approx(DEADLINE_S, abs=1)
        assert first.is_dead, "it may not come back and write what is of another's"
        ((_, cause),) = losses.lost
        assert cause.startswith("desk: clerk-0 on node-of-clerk-0, work() gave no answer within 50 s")
        assert "deadlines.*" in cause

    fake_ray.run(scenario())


def test_an_engine_that_fails_makes_its_worker_lost():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool, replaces=False)
        world.actors[0].inside.failure = EngineFailed("the engine failed: RuntimeError: the device is gone")
        assert (await pool.call("work", 0))[0] == ("clerk-1", 0)
        assert world.actors[0].is_dead
        assert "EngineFailed: the engine failed: RuntimeError: the device is gone" in losses.lost[0][1]

    fake_ray.run(scenario())


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RunError("rollout 3-0 has no topk_ids"), ActorError),
        (ValueError("bad"), ActorError),
        (ObjectLostError("00" * 28, "", ""), PayloadLost),
        (WeightSyncError("no sign of life"), WeightSyncError),
    ],
)
def test_an_error_of_the_application_costs_no_worker(failure, kind):
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool)
        for actor in world.actors:
            actor.inside.failure = failure
        with pytest.raises(kind) as caught:
            await pool.call("work", 0)
        assert type(caught.value) is kind
        assert losses.lost == [] and len(pool) == 2
        assert sum(len(actor.inside.asked) for actor in world.actors) == 1

    fake_ray.run(scenario())


def test_an_argument_that_is_gone_with_its_node_costs_no_worker():
    async def scenario():
        world, pool = await desks(1)
        losses = Losses(pool)
        _, payload = await pool.call("work", 0)
        world.objects.lose(payload)
        with pytest.raises(PayloadLost, match="an object that it needs is gone"):
            await pool.call("work", payload)
        assert losses.lost == []

    fake_ray.run(scenario())


def test_without_anybody_who_replaces_a_loss_is_the_caller_s_failure():
    async def scenario():
        world, pool = await desks(1)
        world.actors[0].inside.may_answer.clear()
        call = asyncio.create_task(pool.call("work", 0))
        await until(lambda: world.actors[0].inside.asked)
        world.actors[0].die()
        with pytest.raises(MemberLost, match="clerk-0"):
            await call
        with pytest.raises(ActorError, match="desk: no worker is left; the last was lost: desk: clerk-0"):
            await pool.call("work", 1)

    fake_ray.run(scenario())


def test_all_that_are_there_are_asked_and_those_that_die_meanwhile_are_lost():
    async def scenario():
        world, pool = await desks(3)
        Losses(pool, replaces=False)
        held(pool, world)
        pool.members[2].become("joining")
        call = asyncio.create_task(pool.call_all("tell", 7))
        await until(lambda: all(actor.inside.asked for actor in world.actors))
        world.actors[1].die()
        world.actors[0].inside.may_answer.set()
        world.actors[2].inside.may_answer.set()
        await call
        assert [actor.inside.asked for actor in world.actors] == [[7]] * 3
        assert [member.name for member in pool.members] == ["clerk-0", "clerk-2"]

    fake_ray.run(scenario())


def test_the_first_failure_of_calls_to_all_ends_the_others():
    """The bug: they went on beside whatever their caller did next, as the calls of an evaluation that was begun again
    did beside the new ones."""

    async def scenario():
        world, pool = await desks(3)
        held(pool, world)
        world.actors[1].inside.failure = ValueError("no such thing")
        call = asyncio.create_task(pool.call_all("tell", 7))
        await until(lambda: all(actor.inside.asked for actor in world.actors))
        world.actors[1].inside.may_answer.set()
        with pytest.raises(ActorError, match="clerk-1 .* no such thing") as caught:
            await call
        assert isinstance(caught.value.__cause__, RayTaskError)
        assert [member.num_calls for member in pool.members] == [0, 0, 0]

    fake_ray.run(scenario())


def test_one_that_needs_weights_gets_no_call_before_it_has_them():
    async def scenario():
        world, pool = await desks(1, needs_weights=True)
        (member,) = pool.members
        assert member.state == "joining" and pool.has_been_up
        call = asyncio.create_task(pool.call("tell", 0, payload=False))
        await asyncio.sleep(10)
        assert world.actors[0].inside.asked == []
        pool.admit(member)
        assert await call == ("clerk-0", 0)

    fake_ray.run(scenario())


def test_one_that_joins_a_later_run_begins_with_that_run_s_settings():
    async def scenario():
        world, pool = await desks(1)
        Losses(pool, replaces=False)
        await pool.begin("first run", deadline_s=DEADLINE_S)
        await pool.begin("second run", deadline_s=DEADLINE_S)
        joiner = pool.grow()
        await pool.bring_up(joiner, DEADLINE_S)
        assert actor_of(joiner).inside.begun_with == [("second run",)]
        assert world.actors[0].inside.begun_with == [("first run",), ("second run",)]

    fake_ray.run(scenario())


def test_one_that_is_told_of_a_run_when_the_next_begins_joins_with_the_next_one_s_settings():
    """The bug: it was still starting and so not told of the next run, and joined with the one before it in mind."""

    async def scenario():
        world, pool = await desks(1)
        await pool.begin("first run", deadline_s=DEADLINE_S)
        joiner = pool.grow()
        world.before = lambda actor, method: actor.stop() if (actor.name, method) == ("clerk-1", "begin") else None
        bringing = asyncio.create_task(pool.bring_up(joiner, DEADLINE_S))
        await until(lambda: not actor_of(joiner).moves.is_set())
        world.before = lambda actor, method: None
        await pool.begin("second run", deadline_s=DEADLINE_S)
        actor_of(joiner).go_on()
        await bringing
        assert joiner.state == "ready"
        assert actor_of(joiner).inside.begun_with == [("first run",), ("second run",)]

    fake_ray.run(scenario())


def test_one_that_leaves_gets_no_new_calls():
    async def scenario():
        world, pool = await desks(2)
        pool.members[0].become("leaving")
        assert {(await pool.call("work", number))[0][0] for number in range(4)} == {"clerk-1"}

    fake_ray.run(scenario())


@pytest.mark.parametrize("kind", ["died", "ended"])
def test_work_of_members_that_are_gone_stays_in_the_account(kind):
    async def scenario():
        world, pool = await desks(2)
        Losses(pool, replaces=False)
        held(pool, world)
        began = asyncio.get_running_loop().time()
        calls = [asyncio.create_task(pool.call("work", number)) for number in range(2)]
        await asyncio.sleep(10)
        actor = world.actors[1]
        actor.die() if kind == "died" else pool.end(pool.members[1])
        await asyncio.sleep(10)
        world.actors[0].inside.may_answer.set()
        await asyncio.gather(*calls)
        await asyncio.sleep(20)
        busy, there = pool.work()
        spent = asyncio.get_running_loop().time() - began
        assert busy == pytest.approx(20 + 10, abs=0.1)
        assert there == pytest.approx(spent + 10, abs=0.1)
        assert pool.work()[1] - there < 0.1, "who is gone is not there any longer"

    fake_ray.run(scenario())


def test_a_room_that_stops_ends_every_actor():
    async def scenario():
        world, pool = await desks(3)
        pool.stop()
        assert len(pool) == 0 and all(actor.is_dead for actor in world.actors)

    fake_ray.run(scenario())


def test_a_heartbeat_is_answered_at_work_and_not_by_one_that_is_stopped():
    async def scenario():
        world, pool = await desks(1)
        held(pool, world)
        call = asyncio.create_task(pool.call("work", 0))
        await pool.ping(pool.members[0], 5.0)
        assert pool.num_calls == 1, "a sign of life is no work"
        world.actors[0].stop()
        with pytest.raises(MemberLost, match="clerk-0 on node-of-clerk-0, heartbeat gave no answer within 5 s"):
            await pool.ping(pool.members[0], 5.0)
        call.cancel()

    fake_ray.run(scenario())
