"""A pool: the actors of one room, the calls to them, and what each call may take.

Every call has a deadline, and every failure names room, actor, method and node. The pool also
measures how long its actors had work, which is each room's idle share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from opd_ray.errors import ActorError, DeadlineError


@dataclass
class Member:
    """One actor of a pool, and its work so far."""

    handle: ActorHandle
    name: str
    node: str = "not placed yet"
    num_calls: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0

    def begin(self) -> None:
        if self.num_calls == 0:
            self.busy_since = time.monotonic()
        self.num_calls += 1

    def end(self) -> None:
        self.num_calls -= 1
        if self.num_calls == 0:
            self.busy_s += time.monotonic() - self.busy_since

    def busy(self) -> float:
        """Seconds with at least one call under way."""
        running = time.monotonic() - self.busy_since if self.num_calls else 0.0
        return self.busy_s + running


class Pool:
    """The actors of one room. Knows nothing of what they do."""

    def __init__(self, room: str, members: Sequence[Member], deadline_s: float) -> None:
        self.room, self.members, self.deadline_s = room, list(members), deadline_s

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_calls(self) -> int:
        """Calls under way, queued ones included."""
        return sum(member.num_calls for member in self.members)

    def busy_s(self) -> float:
        """Seconds of work, mean over the members."""
        return sum(member.busy() for member in self.members) / len(self.members)

    async def call(self, method: str, *args: Any) -> tuple[Any, ObjectRef]:
        """Calls the least loaded member; returns its first return value and a ref to the second.

        The method returns a small answer and a payload; the payload stays in the object store.
        """
        member = min(self.members, key=lambda each: each.num_calls)
        answer, payload = getattr(member.handle, method).options(num_returns=2).remote(*args)
        return await self._result(member, method, answer, self.deadline_s), payload

    async def call_all(
        self, method: str, *args: Any, each: Iterable[Any] | None = None, deadline_s: float | None = None
    ) -> list[Any]:
        """Calls every member at once; ``each`` gives every member a first argument of its own."""
        own = [()] * len(self) if each is None else [(value,) for value in each]
        refs = [
            (member, getattr(member.handle, method).remote(*first, *args))
            for member, first in zip(self.members, own, strict=True)
        ]
        limit = self.deadline_s if deadline_s is None else deadline_s
        return await asyncio.gather(*(self._result(member, method, ref, limit) for member, ref in refs))

    async def locate(self, deadline_s: float) -> None:
        """Waits until every member has started, and learns its node."""
        for member, node in zip(self.members, await self.call_all("node", deadline_s=deadline_s), strict=True):
            member.node = node

    async def _result(self, member: Member, method: str, ref: ObjectRef, deadline_s: float) -> Any:
        where = f"{self.room}: {member.name} on {member.node}, {method}()"
        member.begin()
        try:
            return await asyncio.wait_for(_value(ref), deadline_s)
        except TimeoutError:
            raise DeadlineError(
                f"{where} gave no answer within {deadline_s:g} s; see its log in the Ray dashboard "
                "(or raise the room's deadline under deadlines.*)"
            ) from None
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise ActorError(f"{where} failed: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise ActorError(f"{where}: {_death(error)}") from error
        except RayError as error:
            raise ActorError(f"{where}: {type(error).__name__}: {error}") from error
        finally:
            member.end()


async def _value(ref: ObjectRef) -> Any:
    return await ref


def _death(error: RayActorError) -> str:
    """Why an actor died, in one line: of an error in its constructor the last line of the remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        return f"the actor could not start: {lines[-1]}"
    return f"the actor died: {' '.join(lines)}"
