"""What becomes of the servers that teachers are: asked of the actors that ask them, and said when it changes.

Actors find out by themselves which server is of use; here is who tells people. Whatever one actor has put out is out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from opd_ray.config import Config
from opd_ray.errors import ActorError
from opd_ray.messages import ServerState
from opd_ray.rooms import Rooms
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member
from opd_ray.rooms.together import together

_LOOK_S = 1.0
_ANSWER_S = 10.0
"""How long an actor may take to say how its servers fare."""


class ServerWatch:
    """Watches the servers of every role that has some, while ``run`` runs."""

    def __init__(self, config: Config, rooms: Rooms, say: Callable[..., None]) -> None:
        """``say(kind, text, room=...)`` tells people."""
        roles = [role for role, scorer in config.scorers.items() if scorer.url]
        self._pools: dict[str, Pool] = {role: rooms.scorers[role] for role in roles}
        self._say = say
        self._states: dict[str, dict[str, ServerState]] = {role: {} for role in roles}

    async def run(self) -> None:
        """Until cancelled."""
        while self._pools:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Asks every actor, and says what has changed."""
        for role, pool in self._pools.items():
            views = await together(*(self._view(pool, member) for member in pool.those("ready")))
            for url in dict.fromkeys(state.url for view in views for state in view):
                now = _merged([state for view in views for state in view if state.url == url])
                self._tell(role, self._states[role].get(url), now)

    async def _view(self, pool: Pool, member: Member) -> tuple[ServerState, ...]:
        try:
            return await pool.peek(member, "servers", _ANSWER_S)
        except ActorError:
            return ()  # the supervisor sees to those that are lost

    def _tell(self, role: str, before: ServerState | None, now: ServerState) -> None:
        if before is not None and before.state == "out":
            return  # an actor that came later has yet to find out
        self._states[role][now.url] = now
        was, why = (before.state, before.why) if before else ("in use", "")
        facts = {"room": role, "url": now.url, "distance_nats": now.distance}
        if now.state == "out":
            self._say("server_out", f"{role}: {now.why}; it is not asked any more", **facts)
        elif now.state == "resting" and was != "resting":
            self._say("server_rests", f"{role}: {now.why}; it is left alone for a while, then tried again", **facts)
        elif now.state == "in use" and was == "resting":
            self._say("server_back", f"{role}: {now.url} answers again", **facts)
        elif now.state == "in use" and now.why and now.why != why:
            self._say("servers_differ", f"{role}: {now.why}", **facts)

    def note(self, role: str) -> str | None:
        """What is wrong with a role's servers; None where nothing is, or where it has none."""
        states = self._states.get(role, {}).values()
        wrong = [f"{each.why} since {each.since_s:.0f} s" for each in states if each.state != "in use"]
        return f"{len(states) - len(wrong)} of {len(states)} servers in use: {'; '.join(wrong)}" if wrong else None

    def metrics(self) -> dict[str, float]:
        """By role: servers in use, and the largest distance between answers that should be alike."""
        values = {}
        for role, states in self._states.items():
            used = [state for state in states.values() if state.state == "in use"]
            values[f"servers/{role}_in_use"] = float(len(used))
            values[f"servers/{role}_distance"] = max((state.distance for state in states.values()), default=0.0)
        return values


def _merged(views: Sequence[ServerState]) -> ServerState:
    """One server as all actors see it: out if it is for any, resting only if it is for all."""
    for state in ("out", "in use", "resting"):
        if seen := [view for view in views if view.state == state]:
            return max(seen, key=lambda view: (bool(view.why), view.since_s))
    raise AssertionError("unreachable")
