"""Groups: one lost member is the whole group's loss, and what is a loss."""

import asyncio

import pytest
from ray.exceptions import ObjectLostError

import fake_ray
from fake_ray import until
from held_actors import DEADLINE_S, Desk, group_of, held
from opd_ray.errors import (
    ActorError,
    GroupLost,
    InputError,
    PayloadLost,
    RunError,
    StartFailed,
    WeightSyncError,
)


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
