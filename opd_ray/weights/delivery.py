"""Brings the learner's weights to everyone who samples with them or follows them, whoever that is at the moment.

Weights travel in a group of processes of which the learner is rank 0 (:mod:`opd_ray.weights`). A group has fixed
members, so it is formed anew, just before a broadcast, when workers came or went. Workers that come up while the
learner does not train get the weights at once: all that wait for them at that moment, in a group of their own with the
learner; the others notice nothing, and the learner stands still for one broadcast, however many they are.

A broadcast in which a member died or stopped ends by its deadline. Members that gave no answer are dropped, and the
broadcast is repeated with the others: until it succeeds, their engines go on with the weights that they have, whole
(those of tensor parallelism, which receive between two steps, do not step). Where all answer and it fails all
the same, they get the weights one by one in the end, which tells who it is that cannot take them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Awaitable, Callable, Sequence

from opd_ray.config import Config
from opd_ray.errors import GroupLost, MemberLost, WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.rooms import Rooms
from opd_ray.rooms.group import Group
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member, State
from opd_ray.rooms.together import together
from opd_ray.weights import BUCKET_BYTES
from opd_ray.weights.manifest import num_bytes

_MARGIN_S = 5.0
"""How much later than the members of a group the driver gives up on it."""
_MOST_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class _Receiver:
    member: Member
    room: Pool | Group
    width: int
    """Processes that receive: the workers of one engine."""

    async def ask(self, method: str, argument: object, deadline_s: float) -> None:
        await self.room.ask(self.member, method, argument, deadline_s=deadline_s)

    def admit(self) -> None:
        """It has the weights now."""
        if self.member.state == "joining":
            self.room.admit(self.member)


class Delivery:
    """The student's way from the learner to its receivers, for one run."""

    def __init__(self, config: Config, rooms: Rooms, say: Callable[..., None]) -> None:
        self._config, self._say = config, say
        self._learner, self._generators = rooms.learner, rooms.generators
        self._followers = list(rooms.followers.values())
        self.manifest: WeightManifest | None = None
        """What is sent; set before the first broadcast."""
        self.version: int | None = None
        """Of the weights that the receivers hold; None before the first broadcast."""
        self.lock = asyncio.Lock()
        """Held by whoever changes the learner's weights or sends them."""
        self.group_size = 0
        self.num_rebuilds = self.num_failed = 0
        self._formed: list[Member] = []

    @property
    def num_bytes(self) -> int:
        """Sent to each receiver by one broadcast."""
        return num_bytes(self.manifest) if self.manifest else 0

    def forget(self) -> None:
        """The learner is a new one: there is no group, and nobody holds a version that counts."""
        self.version, self._formed = None, []

    async def broadcast(self, version: int) -> None:
        """Sends the learner's weights to all receivers at once; the caller holds the lock.

        Raises GroupLost when the learner or a follower is lost, WeightSyncError when it fails again and again.
        """
        self.version = None  # a worker that comes up now waits for the end of this
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            if self._config.rollout.in_flight == "drain":
                await together(*map(self._drain, self._generators.those("ready", "leaving")))
            failure = await (self._attempt(version) if attempt < _MOST_ATTEMPTS else self._last_attempt(version))
            if failure is None:
                self.version = version
                return
            self.num_failed += 1
            self._formed = []
            self._say("broadcast", f"weights: broadcast {attempt} of version {version} failed: {failure}")
        raise WeightSyncError(f"weights: version {version} could not be sent in {_MOST_ATTEMPTS} attempts: {failure}")

    async def welcome(self, member: Member) -> None:
        """Gives a generator that came up the weights that the others have, and with it all that wait for them as well,
        unless a broadcast did so meanwhile. It may still be without them afterwards, and is welcomed again then."""
        async with self.lock:
            if member.state != "joining" or self.version is None:
                return
            joiners = self._receiving("joining")
            failure = await self._apart(joiners, self.version)
            if failure is None:
                for joiner in joiners:
                    joiner.admit()  # unless it was told to leave meanwhile
            elif len(joiners) == 1:
                joiners[0].room.lose(member, failure)
            elif all(joiner.member.state != "gone" for joiner in joiners):
                # All answered, and it failed all the same: one by one it shows who it is.
                for joiner, failure in (await self._one_by_one(joiners, self.version)).items():
                    joiner.room.lose(joiner.member, failure)

    async def _drain(self, member: Member) -> None:
        """Waits for a generator's unfinished responses, which may take longer than any broadcast."""
        try:
            await self._generators.ask(member, "drain")
        except MemberLost as error:
            self._generators.lose(member, str(error))

    async def _attempt(self, version: int) -> str | None:
        """Why it failed, if so."""
        receivers = self._receivers()
        if not receivers:
            return None
        failure = None
        if [receiver.member for receiver in receivers] != self._formed:
            failure = await self._form(receivers)
        if failure is None:
            manifest = self._manifest(version)
            failure = await self._together(
                self._learner.call_all("send_weights", manifest, deadline_s=self._limit_s),
                "update_weights",
                [(receiver, receiver.ask("update_weights", manifest, self._limit_s)) for receiver in receivers],
            )
        if failure is None:
            for receiver in receivers:
                receiver.admit()
        return failure

    async def _last_attempt(self, version: int) -> str | None:
        """Loses those to whom the learner cannot bring the weights alone; fails where that is everyone."""
        receivers = self._receivers()
        failures = await self._one_by_one(receivers, version)
        if receivers and len(failures) == len(receivers):
            return next(iter(failures.values()))
        for receiver, failure in failures.items():
            receiver.room.lose(receiver.member, failure)
        return None

    async def _one_by_one(self, receivers: Sequence[_Receiver], version: int) -> dict[_Receiver, str]:
        """Each gets the weights alone; those with whom that failed, and why."""
        failures: dict[_Receiver, str] = {}
        for receiver in receivers:
            if failure := await self._apart([receiver], version):
                failures[receiver] = failure
            else:
                receiver.admit()
        return failures

    async def _apart(self, receivers: Sequence[_Receiver], version: int) -> str | None:
        """The weights to some receivers, in a group of their own with the learner; why that failed, if so."""
        ours, *theirs = await self._groups(receivers)
        manifest = self._manifest(version)

        async def take(receiver: _Receiver, group: TransferGroup) -> None:
            await receiver.ask("connect", group, self._limit_s)
            await receiver.ask("update_weights", manifest, self._limit_s)

        # Forming the group and sending are one call of the learner here, each within its limit.
        return await self._together(
            self._learner.call_all("send_weights", manifest, ours, deadline_s=2 * self._limit_s),
            "update_weights",
            [(each, take(each, group)) for each, group in zip(receivers, theirs, strict=True)],
        )

    async def _form(self, receivers: Sequence[_Receiver]) -> str | None:
        self.num_rebuilds += 1
        ours, *theirs = await self._groups(receivers)
        failure = await self._together(
            self._learner.call_all("open_transport", ours, deadline_s=self._limit_s),
            "connect",
            [(each, each.ask("connect", group, self._limit_s)) for each, group in zip(receivers, theirs, strict=True)],
        )
        self._formed = [] if failure else [receiver.member for receiver in receivers]
        self.group_size = len(receivers) + 1
        return failure

    async def _together(
        self, learner: Awaitable[object], method: str, calls: Sequence[tuple[_Receiver, Awaitable[None]]]
    ) -> str | None:
        """Both sides at once. Drops the members that are lost; returns the first failure.

        When the learner has given up, so have all that are well: the others get a moment to say so.
        """
        ours = asyncio.ensure_future(learner)
        asked = [asyncio.ensure_future(call) for _, call in calls]
        try:
            await asyncio.wait([ours])
            if isinstance(lost := ours.exception(), GroupLost):
                raise lost  # whatever the others say, it is not their failure
            await asyncio.wait(asked, timeout=_MARGIN_S if ours.exception() else None)
            answers = [_answer_of(call, receiver, method) for call, (receiver, _) in zip(asked, calls, strict=True)]
        finally:
            for call in (ours, *asked):
                call.cancel()
        for (receiver, _), answer in zip(calls, answers, strict=True):
            if isinstance(answer, MemberLost):
                receiver.room.lose(receiver.member, str(answer))
        failures = list(filter(None, [*answers, ours.exception()]))
        for failure in failures:
            if not isinstance(failure, MemberLost | WeightSyncError):
                raise failure
        return str(failures[0]) if failures else None

    def _receivers(self) -> list[_Receiver]:
        return [
            *self._receiving("joining", "ready", "leaving"),
            *(_Receiver(member, group, 1) for group in self._followers for member in group.members),
        ]

    def _receiving(self, *states: State) -> list[_Receiver]:
        """The generators in some states."""
        width = self._config.rollout.tensor_parallel_size
        return [_Receiver(member, self._generators, width) for member in self._generators.those(*states)]

    async def _groups(self, receivers: Sequence[_Receiver]) -> list[TransferGroup]:
        """One for the learner, then one for each receiver."""
        host, port = (await self._learner.call_all("node_address", deadline_s=self._config.deadlines.start_s))[0]
        ranks, world_size, secret = [0], 1, secrets.token_hex(32)
        for receiver in receivers:
            ranks.append(world_size)
            world_size += receiver.width
        return [
            TransferGroup(
                backend=self._config.weight_backend,
                host=host,
                port=port,
                rank=rank,
                world_size=world_size,
                timeout_s=self._config.weights.timeout_s,
                bucket_bytes=BUCKET_BYTES,
                secret=secret,
            )
            for rank in ranks
        ]

    def _manifest(self, version: int) -> WeightManifest:
        return dataclasses.replace(self.manifest, version=version)

    @property
    def _limit_s(self) -> float:
        # A wait without progress ends by the timeout; one that begins late in a transfer, by twice that.
        return 2 * self._config.weights.timeout_s + _MARGIN_S


def _answer_of(call: asyncio.Future[None], receiver: _Receiver, method: str) -> BaseException | None:
    """How a call failed, if it did or gave no answer yet."""
    if call.done():
        return call.exception()
    member = receiver.member
    where = f"{receiver.room.room}: {member.name} on {member.node}, {method}()"
    return MemberLost(f"{where} gave no answer when the learner had given up; see its log in the Ray dashboard")
