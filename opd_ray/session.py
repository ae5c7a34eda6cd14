"""Rooms that are up: started for one run, or kept for several runs one after another.

Starting the rooms (placement, imports, models, rendezvous) takes as long as a short run. A study therefore keeps
them, and each of its runs only loads its own student.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator

import ray

from opd_ray import launch
from opd_ray.config import Config
from opd_ray.pipeline import Rooms
from opd_ray.preflight import Preflight


@contextlib.contextmanager
def cluster() -> Iterator[str | None]:
    """The cluster of `ray job submit` or of RAY_ADDRESS, or a Ray of its own that ends with the block.

    Gives the address of its dashboard, if it has one and this call connected to it.
    """
    if ray.is_initialized():
        yield None
        return
    # It says with every start that token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    context = ray.init(logging_level="WARNING", log_to_driver=bool(os.environ.get("OPD_RAY_ACTOR_LOGS")))
    try:
        yield context.dashboard_url
    finally:
        ray.shutdown()


def new_namespace() -> str:
    """A Ray namespace of its own, in which actors can have plain names."""
    return f"opd-ray-{uuid.uuid4().hex[:8]}"


class Session:
    """Rooms for one run after another, all with the same actors and engines."""

    def __init__(self, rooms_for: Config | None = None) -> None:
        """``rooms_for`` asks for every room that any of the runs needs; by default the first run's own."""
        self._rooms_for = rooms_for
        self._rooms: Rooms | None = None

    async def begin(self, config: Config, facts: Preflight) -> Rooms:
        """Rooms on the models of ``config``, started now or taken over from the run before."""
        began = time.monotonic()
        if self._rooms is None:
            self._rooms = launch.start_rooms(
                self._rooms_for or config, namespace=new_namespace(), max_context_tokens=facts.max_context_tokens
            )
            rooms = self._rooms.all
            print(f"starting {', '.join(f'{len(pool)} {room}' for room, pool in rooms.items())} actors", flush=True)
            await launch.connect(self._rooms_for or config, self._rooms, facts.eos_token_ids)
            if self._rooms_for is not None:
                await self._begin_again(config, facts)
        else:
            await self._begin_again(config, facts)
        print(f"all rooms are up after {time.monotonic() - began:.0f} s", flush=True)
        return self._rooms

    async def _begin_again(self, config: Config, facts: Preflight) -> None:
        """Rooms of which only some began are of no use to any run."""
        try:
            await launch.begin(config, self._rooms, facts.eos_token_ids)
        except BaseException:
            self.close()
            raise

    async def abandon(self) -> None:
        """Drops what the generators still work on for a run that ended or went back."""
        if self._rooms is not None:
            pools = [self._rooms.generators, *filter(None, [self._rooms.teacher_generators])]
            await asyncio.gather(*(pool.call_all("abandon") for pool in pools))

    def close(self) -> None:
        """Ends the actors."""
        if self._rooms is not None:
            launch.stop(*self._rooms.all.values(), self._rooms.recorder)
            self._rooms = None
