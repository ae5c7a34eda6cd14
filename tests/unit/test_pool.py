"""What rooms make of the ways in which an actor can fail, and how pools and groups hand out work."""

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
from fake_ray import World, actor_of, until
from opd_ray.config import PoolSize
from opd_ray.errors import (
    ActorError,
    EngineFailed,
    GroupLost,
    InputError,
    MemberLost,
    PayloadLost,
    RunError,
    StartFailed,
    WeightSyncError,
)
from opd_ray.pool import Group, Pool
from opd_ray.room import _death, explained

DEADLINE_S = 50.0


class Desk:
    """An actor whose answers wait until the test says so, or fail as it says."""

    def __init__(self, actor):
        self.actor, self.begun_with, self.asked = actor, [], []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.failure = None

    def node(self):
        return self.actor.node

    def begin(self, *settings):
        self.begun_with.append(settings)

    async def work(self, what):
        self.asked.append(what)
        await self.may_answer.wait()
        if self.failure is not None:
            raise self.failure
        return (self.actor.name, what), f"payload of {what}"

    async def tell(self, what):
        return (await self.work(what))[0]


class Losses:
    """Whoever replaces lost workers."""

    def __init__(self, pool, replaces=True):
        self.lost, self._replaces = [], replaces
        pool.on_loss = self

    def __call__(self, pool, member, cause):
        self.lost.append((member.name, cause))
        if self._replaces:
            member = pool.grow()
            asyncio.get_running_loop().create_task(pool.bring_up(member, DEADLINE_S))


async def desks(number, **more):
    """A pool of so many workers that are up, and the objects behind them."""
    world = World()
    pool = Pool("desk", world.spawning("clerk", Desk), PoolSize.fixed(number), DEADLINE_S, **more)
    await pool.up(DEADLINE_S)
    return world, pool


def held(pool, world):
    """Every worker holds its answers back from now on."""
    for actor in world.living():
        actor.inside.may_answer.clear()


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
        world, pool = await desks(2)
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
        calls = [asyncio.create_task(pool.call_one("tell", number)) for number in range(3)]
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


def test_a_call_that_takes_down_three_workers_is_held_to_be_the_cause():
    async def scenario():
        world, pool = await desks(2)
        losses = Losses(pool)

        def before(actor, method):
            if method == "work":
                actor.die("killed by the kernel")

        world.before = before
        with pytest.raises(ActorError, match="desk: one call took down 3 workers, the last: desk: clerk-") as caught:
            await pool.call("work", "poison")
        assert not isinstance(caught.value, MemberLost)
        assert len(losses.lost) == 3
        world.before = lambda *_: None
        await until(lambda: len(pool.those("ready")) == 2)
        assert (await pool.call_one("tell", "harmless"))[1] == "harmless"

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


def test_all_that_are_there_are_asked_and_those_that_die_meanwhile_give_no_answer():
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
        assert await call == [("clerk-0", 7), ("clerk-2", 7)]

    fake_ray.run(scenario())


def test_one_that_needs_weights_gets_no_call_before_it_has_them():
    async def scenario():
        world, pool = await desks(1, needs_weights=True)
        (member,) = pool.members
        assert member.state == "joining" and pool.has_been_up
        call = asyncio.create_task(pool.call_one("tell", 0))
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


# ---- groups ----


async def group_of(size, kind=Desk):
    world = World()
    group = Group("team", world.spawning("rank", kind), size, DEADLINE_S)
    await group.up(DEADLINE_S)
    return world, group


def test_a_lost_rank_is_the_group_s_loss_although_others_report_a_broken_collective_first():
    async def scenario():
        world, group = await group_of(3)
        held(group, world)
        call = asyncio.create_task(group.call_all("work", "step"))
        await until(lambda: all(actor.inside.asked for actor in world.actors))
        for actor in world.actors[1:]:
            actor.inside.failure = RuntimeError("Connection closed by peer")
            actor.inside.may_answer.set()
        await asyncio.sleep(1)
        assert not call.done(), "the one that died may be known a moment later"
        world.actors[0].die()
        with pytest.raises(GroupLost, match="team: rank-0 on node-of-rank-0, work.*the actor died") as caught:
            await call
        assert caught.value.room == "team"
        assert group.last_loss == str(caught.value)

    fake_ray.run(scenario())


def test_a_collective_that_breaks_on_all_is_the_group_s_loss():
    """A rank that lost its connection may live; nobody can go on without starting anew."""

    async def scenario():
        world, group = await group_of(2)
        for actor in world.actors:
            actor.inside.failure = RuntimeError("Connection closed by peer")
        with pytest.raises(GroupLost, match="Connection closed by peer"):
            await group.call_all("work", "step")

    fake_ray.run(scenario())


def test_a_collective_that_breaks_on_some_while_others_hang_is_the_group_s_loss():
    async def scenario():
        world, group = await group_of(2)
        held(group, world)
        world.actors[1].inside.failure = RuntimeError("Connection closed by peer")
        world.actors[1].inside.may_answer.set()
        began = asyncio.get_running_loop().time()
        with pytest.raises(GroupLost):
            await group.call_all("work", "step")
        assert asyncio.get_running_loop().time() - began < DEADLINE_S / 2

    fake_ray.run(scenario())


@pytest.mark.parametrize("failure", [RunError("learner rank 1, step 3: not its plan"), InputError("other ranks")])
def test_an_error_of_ours_on_one_rank_is_raised_as_itself(failure):
    """It would come again: to start the group anew would hide it, twenty times."""

    async def scenario():
        world, group = await group_of(2)
        world.actors[0].inside.failure = RuntimeError("Connection closed by peer")
        world.actors[1].inside.failure = failure
        with pytest.raises(ActorError, match=str(failure)) as caught:
            await group.call_all("work", "step")
        assert not isinstance(caught.value, GroupLost)

    fake_ray.run(scenario())


def test_an_error_of_a_single_rank_is_raised_as_itself():
    async def scenario():
        world, group = await group_of(1)
        world.actors[0].inside.failure = ValueError("bad")
        with pytest.raises(ActorError, match="ValueError: bad") as caught:
            await group.call_all("work", "step")
        assert not isinstance(caught.value, GroupLost)

    fake_ray.run(scenario())


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(ObjectLostError("00" * 28, "", ""), PayloadLost), (WeightSyncError("no sign of life"), WeightSyncError)],
)
def test_what_can_be_mended_without_a_new_group_is_told_apart(failure, kind):
    async def scenario():
        world, group = await group_of(2)
        world.actors[0].inside.failure = RuntimeError("Connection closed by peer")
        world.actors[1].inside.failure = failure
        with pytest.raises(kind):
            await group.call_all("work", "step")

    fake_ray.run(scenario())


def test_a_rank_that_cannot_start_ends_the_wait_at_once():
    class Broken(Desk):
        def __init__(self, actor):
            if actor.name == "rank-1":
                raise OSError("no such model")
            super().__init__(actor)

    async def scenario():
        began = asyncio.get_running_loop().time()
        with pytest.raises(StartFailed, match="rank-1.*no such model"):
            await group_of(2, Broken)
        assert asyncio.get_running_loop().time() - began < DEADLINE_S

    fake_ray.run(scenario())


def test_a_silent_rank_is_the_group_s_loss_at_the_deadline():
    async def scenario():
        world, group = await group_of(2)
        world.actors[1].stop()
        with pytest.raises(GroupLost, match=r"rank-1 .* gave no answer within 50 s"):
            await group.call_all("work", "step")
        with pytest.raises(GroupLost):
            await group.call_all("node", deadline_s=3)

    fake_ray.run(scenario())


def test_a_group_that_is_started_anew_has_other_actors_and_none_of_the_old():
    async def scenario():
        world, group = await group_of(2)
        world.actors[1].die()
        group.is_up = True
        group.restart()
        assert [member.name for member in group.members] == ["rank-0-again-1", "rank-1-again-1"]
        assert not group.is_up and group.num_restarts == 1
        assert world.actors[0].is_dead, "one that is left has half of a state that nobody wants"
        await group.up(DEADLINE_S)
        assert [name for name, _ in await group.call_all("tell", 1)] == ["rank-0-again-1", "rank-1-again-1"]

    fake_ray.run(scenario())


def test_each_rank_gets_its_own_first_argument():
    async def scenario():
        _, group = await group_of(3)
        answers = await group.call_all("tell", each=[10, 11, 12])
        assert answers == [("rank-0", 10), ("rank-1", 11), ("rank-2", 12)]

    fake_ray.run(scenario())


def test_what_a_group_reserved_is_given_back_once_when_it_stops_and_not_when_it_restarts():
    async def scenario():
        _, group = await group_of(1)
        given_back = []
        group.on_stop = lambda: given_back.append(1)
        group.restart()
        assert given_back == []
        group.stop()
        group.stop()
        assert given_back == [1]

    fake_ray.run(scenario())


def test_a_follower_that_dies_while_it_scores_is_the_group_s_loss():
    async def scenario():
        world, group = await group_of(2)
        held(group, world)
        call = asyncio.create_task(group.call("work", 0))
        await until(lambda: world.actors[0].inside.asked)
        world.actors[0].die()
        with pytest.raises(GroupLost):
            await call

    fake_ray.run(scenario())
