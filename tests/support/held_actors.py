"""Pools and groups of actors whose answers a test holds back, or turns into failures."""

import asyncio

from fake_ray import World
from opd_ray.messages import PoolSize
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool

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


async def group_of(size, kind=Desk):
    world = World()
    group = Group("team", world.spawning("rank", kind), size, DEADLINE_S)
    await group.up(DEADLINE_S)
    return world, group
