"""Keeps the rooms of a run at strength: notices the dead, replaces them, lets pools grow and shrink.

The supervisor runs beside the pipeline, in the same event loop. A worker counts as lost when a call to it says so
(its process died, its node went, it gave no answer by a deadline) or when it misses a heartbeat. Pools get a
replacement, up to ``recovery.max_restarts`` in half an hour; the loss of a Group is raised as GroupLost, for
whoever can restore a state. A pool that stays below its minimum ends the run. A node whose end is announced is left
before: its pools' workers finish their calls while others take their places, and of a group the state is saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import ray
from ray.exceptions import RayError

from opd_ray.config import Config
from opd_ray.errors import MemberLost, RunError, StartFailed
from opd_ray.placement import nodes
from opd_ray.placement.demand import Demand, RoomLoad
from opd_ray.placement.restarts import Restarts
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import UNPLACED, Member, busy_share
from opd_ray.rooms.threads import in_thread
from opd_ray.rooms.together import together
from opd_ray.weights.delivery import Delivery

_TICK_S = 1.0
_NOT_UP = "the others are not placed or still load their model"
_DRAIN_S = 120.0
"""How long a worker that is to leave may finish its calls; then they are issued again elsewhere."""
_NOTICE_S = 2.0
"""How often it is asked which nodes are about to go; Ray's own notice of a process that is told to end is 30 s."""
_ASK_S = 30.0
_ENDS_EARLY_S = 3.0
"""How long before its node a worker is given up: it is let go then, and not lost."""
_LOOK_S = 5.0
"""How often demand is looked at; oftener where a pool is to grow after less than three looks."""
_BEATS = 4
"""Heartbeats within the time after which a worker that gave none counts as dead."""


class Supervisor:
    """Watches pools and groups while ``run`` runs."""

    def __init__(
        self,
        config: Config,
        rooms: Rooms,
        delivery: Delivery,
        restarts: Restarts,
        say: Callable[..., None],
        *,
        save_soon: Callable[[], Awaitable[None]],
    ) -> None:
        """``save_soon`` puts the groups' state where it outlives their nodes."""
        self._config, self._rooms, self._pools = config, rooms, rooms.pools
        self._delivery, self._restarts, self._say, self._save_soon = delivery, restarts, say, save_soon
        self.learner_waited_s: Callable[[], float] | None = None
        """Seconds that the learner has waited for rollouts so far: what demand goes by. None before there is one that
        waits: how busy rooms are then tells nothing."""
        self._demand = Demand(config.elastic)
        self._wake = asyncio.Event()
        self._problem: RunError | None = None
        self._bringing: set[Member] = set()
        self._below: dict[str, float | None] = {}
        """Pools that were at strength once, and since when they are not."""
        self._looked = (time.monotonic(), 0.0, {pool.room: pool.work() for pool in self._pools})

    async def run(self) -> None:
        """Until cancelled. Raises RunError when a pool cannot be kept at strength, GroupLost for a silent group."""
        for pool in self._pools:
            pool.on_loss = self._lost
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._config.recovery.heartbeat_s:
                    tasks.create_task(self._listen(), name="heartbeats")
                tasks.create_task(self._heed_notices(tasks), name="notices")
                while True:
                    if self._problem:
                        raise self._problem
                    for pool in self._pools:
                        self._tend(pool, tasks)
                    self._look_at_demand()
                    self._wake.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_S):  # wait_for would miss that a task of the group has failed
                            await self._wake.wait()
        finally:
            self._bringing.clear()
            for pool in self._pools:
                pool.on_loss = None

    def below_min_s(self, room: str) -> float | None:
        """For how long a pool has had fewer ready workers than its minimum."""
        since = self._below.get(room)
        return None if since is None else time.monotonic() - since

    async def wait_for_minimum(self, deadline_s: float) -> None:
        """Until every pool has its minimum of workers up. Raises RunError, with the last loss, at the deadline."""
        until = time.monotonic() + deadline_s
        while short := [pool for pool in self._pools if len(pool.those("ready", "joining")) < pool.size.minimum]:
            # Those that were at strength once have the time that a run gives a room to come back.
            new = [pool for pool in short if pool.room not in self._below]
            if new and time.monotonic() > until:
                pool = new[0]
                raise RunError(
                    f"{pool.room}: {len(pool.those('ready', 'joining'))} of at least {pool.size.minimum} workers came "
                    f"up within {deadline_s:g} s (deadlines.start_s); {pool.last_loss or _NOT_UP}; "
                    "see the cluster's resources and the actors' logs in the Ray dashboard"
                )
            await asyncio.sleep(0.05)
        for pool in self._pools:
            self._below.setdefault(pool.room, None)

    def _lost(self, pool: Pool, member: Member, cause: str) -> None:
        try:
            count = self._restarts.count(pool.room, cause, time.monotonic())
        except RunError as problem:
            self._problem = problem
        else:
            self._say(
                "worker_lost",
                f"lost: {cause}; another takes its place ({count})",
                room=pool.room,
                worker=member.name,
                node=member.node,
            )
        self._wake.set()

    def _tend(self, pool: Pool, tasks: asyncio.TaskGroup) -> None:
        """Brings a pool to its target size, one way or the other."""
        here = pool.those("starting", "joining", "ready")
        for _ in range(pool.target - len(here)):
            pool.grow()
        # One that is not up yet goes before one that works, then the one with the least to finish, the last that came.
        surplus = sorted(here, key=lambda member: (member.state == "ready", member.num_calls, -member.since))
        for member in surplus[: max(0, len(here) - pool.target)]:
            self._let_go(pool, member, "")
        for member in pool.those("leaving"):
            until = member.since + _DRAIN_S if member.ends_at is None else member.ends_at - _ENDS_EARLY_S
            if not member.num_calls or time.monotonic() > until:
                pool.end(member)  # calls that it still had go to another worker
        for member in pool.those("starting", "joining"):
            if member not in self._bringing:
                self._bringing.add(member)
                tasks.create_task(self._bring_up(pool, member), name=f"bring up {member.name}")
        self._check_strength(pool)

    def _let_go(self, pool: Pool, member: Member, why: str) -> None:
        self._say(
            "worker_leaves",
            f"{pool.room}: {member.name} on {member.node} is let go{why}",
            room=pool.room,
            worker=member.name,
            node=member.node,
        )
        if member.state == "starting":
            pool.end(member)  # it has nothing to finish but its start
        else:
            member.become("leaving")

    async def _bring_up(self, pool: Pool, member: Member) -> None:
        limit, alive = self._config.deadlines.start_s, _alive()
        try:
            if member.state == "starting":
                await pool.bring_up(member, limit)
            if member.state == "joining":
                await self._delivery.welcome(member)
        except StartFailed as error:
            if not pool.has_been_up:
                raise  # another would fail in the same way
            pool.lose(member, str(error))
        except MemberLost as error:
            # Ray does not say where one was that never answered. When it reports such a death, it has long taken the
            # node off its list where that was the cause; a constructor that crashes takes no node with it.
            unplaced = time.monotonic() - member.since > limit - _TICK_S or alive - _alive()
            if member.node == UNPLACED and unplaced:
                pool.end(member)  # nowhere to be placed, or its node went: no death, and asked for again
                self._wake.set()
            else:
                pool.lose(member, str(error))
        finally:
            self._bringing.discard(member)

    def _check_strength(self, pool: Pool) -> None:
        if len(pool.those("ready", "joining")) >= pool.size.minimum:
            self._below[pool.room] = None
            return
        if pool.room not in self._below:
            return  # still on its first way up, which has a deadline of its own
        since = self._below[pool.room] = self._below[pool.room] or time.monotonic()
        limit = self._config.recovery.below_min_s
        if time.monotonic() - since > limit:
            raise RunError(
                f"{pool.room}: has {len(pool.those('ready', 'joining'))} workers, fewer than its minimum of "
                f"{pool.size.minimum}, for more than {limit:g} s (recovery.below_min_s); the last loss: "
                f"{pool.last_loss or f'none, {_NOT_UP}'}; add nodes and go on with --resume"
            )

    def _look_at_demand(self) -> None:
        now = time.monotonic()
        if self.learner_waited_s is None:
            self._demand = Demand(self._config.elastic)
            self._looked = (now, 0.0, {pool.room: pool.work() for pool in self._pools})
            return
        waited = self.learner_waited_s()
        before, waited_before, work = self._looked
        wall = now - before
        if wall < min(_LOOK_S, self._config.elastic.grow_after_s / 3):
            return
        loads = []
        self._looked = (now, waited, {pool.room: pool.work() for pool in self._pools})
        for pool in self._pools:
            loads.append(
                RoomLoad(
                    room=pool.room,
                    size=len(pool.those("ready")),
                    starting=len(pool.those("starting", "joining")),
                    minimum=pool.size.minimum,
                    maximum=pool.size.maximum,
                    busy_share=busy_share(self._looked[2][pool.room], work[pool.room]) or 0.0,
                    num_calls=pool.num_calls,
                )
            )
        change = self._demand.look(now, loads, min(1.0, max(0.0, waited - waited_before) / wall))
        for pool in self._pools:
            if by := change.get(pool.room, 0):
                pool.target = min(pool.size.maximum, max(pool.size.minimum, pool.target + by))
                what = "has more to do than its workers can" if by > 0 else "could do with one worker less"
                self._say("pool_resized", f"{pool.room}: {what}; it goes to {pool.target}", room=pool.room)

    async def _heed_notices(self, tasks: asyncio.TaskGroup) -> None:
        """Clears nodes whose end is announced, as long as they are there. The recorder stays: it goes with the node of
        this process, and so does the run."""
        while True:
            await asyncio.sleep(_NOTICE_S)
            here = [
                (room, each) for room in self._rooms.every if room is not self._rooms.recorder for each in room.members
            ]
            try:
                async with asyncio.timeout(_ASK_S):
                    left = await in_thread(nodes.ends_of, [member.handle for _, member in here])
            except (RayError, RuntimeError, OSError):
                continue  # Ray's head does not answer: whom that ends will be noticed
            now = time.monotonic()
            told = [
                (room, member, seconds)
                for (room, member), seconds in zip(here, left, strict=True)
                if seconds is not None and member.ends_at is None and member.state != "gone"
            ]
            for room, member, seconds in told:
                member.ends_at = now + seconds
                when = (
                    f": its node goes in {seconds:.0f} s, as announced" if seconds < float("inf") else ": its node goes"
                )
                if room.holds_state:
                    text = (
                        f"{room.room}: {member.name} on {member.node} is about to be lost{when}; the state is saved now"
                    )
                    self._say("node_leaves", text, room=room.room, worker=member.name, node=member.node)
                elif member.state != "leaving":
                    self._let_go(room, member, f"{when}; another takes its place")
            if any(room.holds_state for room, _, _ in told):
                tasks.create_task(self._save_soon(), name="save soon")
            if told:
                self._wake.set()

    async def _listen(self) -> None:
        """Asks every worker that is up for a sign of life, again and again."""
        limit = self._config.recovery.heartbeat_s
        while True:
            await asyncio.sleep(limit / _BEATS)
            await together(*(self._beat(room, member) for room in self._rooms.every for member in room.members))

    async def _beat(self, room: Pool | Group, member: Member) -> None:
        if member.state in ("starting", "gone"):
            return
        try:
            await room.ping(member, self._config.recovery.heartbeat_s)
        except MemberLost as error:
            if member in room.members:
                room.lose(member, str(error))


def _alive() -> set[str]:
    """Those that are alive, as far as Ray knows."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
