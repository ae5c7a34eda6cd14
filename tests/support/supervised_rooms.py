"""Rooms under supervision, without a pipeline."""

import asyncio

import pytest

import fake_ray
from driven_run import cast_of
from fake_rooms import stream
from fake_workers import MANIFEST
from opd_ray.messages import SamplingSettings
from opd_ray.placement.restarts import Restarts
from opd_ray.placement.supervisor import Supervisor
from opd_ray.weights.delivery import Delivery


class Kept:
    """Rooms under supervision, and what it said."""

    def __init__(self, cast):
        config, self.cast, self.world = cast.config, cast, cast.world
        self.rooms, self.said, self.saved = cast.rooms(), [], 0
        self.delivery = Delivery(config, self.rooms, self._say)
        self.delivery.manifest = MANIFEST
        self.restarts = Restarts(config.recovery)
        self.supervisor = Supervisor(
            config, self.rooms, self.delivery, self.restarts, self._say, save_soon=self._save_soon
        )

    def _say(self, kind, text, **_):
        self.said.append((kind, text))

    async def _save_soon(self):
        self.saved += 1

    @property
    def pool(self):
        return self.rooms.generators

    def ready(self):
        return [member.name for member in self.pool.those("ready")]


def supervised(scenario, *, fails=None, sent=True, prepare=lambda cast: None, **sections):
    """Runs ``scenario(kept)`` beside the supervisor, in rooms that are up and have the weights of version 0; the
    supervisor's failure is raised, unless ``fails`` says which is expected, and then that is returned."""

    async def whole():
        kept = Kept(cast_of(prepare, **sections))

        async def beside():
            if sent:
                for group in kept.rooms.groups:
                    await group.up(100)
                await kept.supervisor.wait_for_minimum(1000)
                async with kept.delivery.lock:
                    await kept.delivery.broadcast(0)
            await scenario(kept)

        async with asyncio.TaskGroup() as tasks:
            supervisor = tasks.create_task(kept.supervisor.run())
            await beside()
            if fails is None:
                supervisor.cancel()

    if fails is None:
        fake_ray.run(whole())
        return None
    with pytest.raises(ExceptionGroup) as caught:
        fake_ray.run(whole())
    (failure,) = caught.value.exceptions
    if isinstance(failure, ExceptionGroup):
        (failure,) = failure.exceptions
    assert type(failure) is fails
    return failure


def generators(number, minimum=None, maximum=None):
    size = {"num_generators": number, "min_generators": minimum, "max_generators": maximum}
    return {name: value for name, value in size.items() if value is not None}


def asking(kept, number):
    """Calls of the generators, one for each slot."""
    settings = SamplingSettings(1.0, 1.0, 8, (0,))
    return [asyncio.create_task(kept.pool.call("generate", [stream()[slot]], settings)) for slot in range(number)]
