"""Starts the actors and the tasks of a run: placement, names, environment."""

from __future__ import annotations

import dataclasses
import os
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from opd_ray.config import Config, LearnerConfig
from opd_ray.errors import RunError
from opd_ray.generate import make_generation_engine
from opd_ray.generate.engine import GenerationEngine
from opd_ray.generate.generator import Generator, GeneratorSettings, StudentGenerator, TeacherGenerator
from opd_ray.learn.learner import Learner
from opd_ray.messages import REFERENCE, PoolSize
from opd_ray.models.checkpoints import load_tokenizer
from opd_ray.placement.wanted import Wanted
from opd_ray.rooms import Rooms, logs
from opd_ray.rooms.group import Group
from opd_ray.rooms.memory import HEAP, KERNEL_CACHES
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.room import Member, Spawn
from opd_ray.rooms.together import together
from opd_ray.score import make_remote_engine, make_scoring_engine
from opd_ray.score.scorer import Scorer
from opd_ray.score.server import key_in
from opd_ray.tasks import get_task
from opd_ray.watch.recorder import Recorder

if TYPE_CHECKING:
    from opd_ray.score.replicas import Baseline
    from opd_ray.score.translation import Translation

_CONCURRENT_CALLS = 1000
"""Calls that an async actor holds at once; what they wait for is the engine."""
_PINGS = "pings"
"""Concurrency group of the actors that work off one call after another: it answers while they do."""
_SHARE = 0.001
"""How much of a node_resource an actor takes: it says where, not how many."""


def start_rooms(
    wanted: Wanted, max_context_tokens: int, servers: Mapping[str, Baseline] = MappingProxyType({})
) -> Rooms:
    """Creates every actor that runs need; returns at once, while they load their models. ``servers``: by role that is
    scored by servers, what they were when the run began."""
    scorers = {
        role: _scorers(role, config, max_context_tokens, servers.get(role)) for role, config in wanted.scorers.items()
    }
    return Rooms(
        generators=start_generators(wanted.first, max_context_tokens),
        learner=_learner(wanted.first),
        scorers=scorers,
        teacher_generators=_teacher_generators(wanted.writer, max_context_tokens) if wanted.writer else None,
        recorder=_recorder(wanted.first),
    )


def start_generators(config: Config, max_context_tokens: int, *, alone: bool = False) -> Pool:
    """The pool of student generators; ``alone`` without a learner whose weights they would have to wait for."""
    rollout = config.rollout
    engine = partial(make_generation_engine, config.student.path, rollout, max_context_tokens)
    return _generators("generate", StudentGenerator, engine, rollout.size, config, needs_weights=not alone)


def _teacher_generators(config: Config, max_context_tokens: int) -> Pool:
    """Generators on the teacher, as large as the student's."""
    rollout = dataclasses.replace(config.rollout, dtype=config.teacher.dtype)
    engine = partial(make_generation_engine, config.teacher.path, rollout, max_context_tokens)
    size = PoolSize.fixed(rollout.teacher_generators)
    return _generators("teacher_generate", TeacherGenerator, engine, size, config, needs_weights=False)


def _settings(config: Config) -> GeneratorSettings:
    return GeneratorSettings(get_task(config.data.task), config.rollout.in_flight, config.repetition)


def _generators(
    room: str, kind: type[Generator], engine: partial[Any], size: PoolSize, config: Config, *, needs_weights: bool
) -> Pool:
    rollout = config.rollout
    tokenizer = partial(load_tokenizer, config.student.path)
    if not rollout.gpus_per_generator:
        engine = partial(_giving_way, engine)
    make = partial(kind, make_engine=engine, load_tokenizer=tokenizer, settings=_settings(config))
    gpus = rollout.gpus_per_generator * rollout.tensor_parallel_size
    resources = _resources(rollout.cpus_per_generator, gpus, rollout.node_resource)
    concurrency = _CONCURRENT_CALLS + 2 * rollout.max_num_seqs  # heartbeats are answered beside whatever it is given
    spawn = _spawning(room, f"{kind.source}-generator", make, resources, config.env, max_concurrency=concurrency)
    limit, at_once = config.deadlines.generate_s, rollout.calls_at_once
    return Pool(room, spawn, size, limit, needs_weights=needs_weights, calls_at_once=at_once)


def _giving_way(make_engine: Callable[[], GenerationEngine]) -> GenerationEngine:
    """An engine on cores that scorers and learner use as well. It goes behind them: what they hold slots for is soon
    free again, while a step of the engine takes hardly longer for more responses, which gather meanwhile."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # this thread, and those that it starts
    except (AttributeError, OSError):  # Linux has it, and not every sandbox allows it
        os.nice(5)  # Ray's workers are at 15 of 19
    return make_engine()


def _scorers(role: str, config: Config, max_context_tokens: int, servers: Baseline | None) -> Pool | Group:
    scorer, limit = config.scorers[role], config.deadlines.score_s
    engine = partial(make_scoring_engine, scorer, max_context_tokens)
    if servers is not None:
        # The key goes to the actor in memory: Ray writes the environment of actors into its logs and shows it.
        engine = partial(make_remote_engine, scorer, servers, key_in(scorer.url_key_env), limit)
    make = partial(Scorer, make_engine=engine, scorer=scorer, member=scorer.follows_student)
    resources = _resources(scorer.cpus_per_actor, scorer.gpus_in_all, scorer.node_resource)
    spawn = _spawning(role, f"{role}-scorer", make, resources, config.env, max_concurrency=_CONCURRENT_CALLS)
    if scorer.follows_student:
        return Group(role, spawn, scorer.num_actors, limit)
    return Pool(role, spawn, scorer.size, limit)


def _learner(config: Config) -> Group:
    learner = config.learner
    resources = _resources(learner.cpus_per_rank, learner.gpus_per_rank, learner.node_resource)
    places = _reserved(learner, resources)

    def spawning(rank: int) -> Spawn:
        place = {"scheduling_strategy": PlacementGroupSchedulingStrategy(places, rank)} if places else {}
        return _spawning("learn", "learner", partial(Learner, config, rank), resources, config.env, pings=True, **place)

    ranks = [spawning(rank) for rank in range(learner.num_ranks)]
    group = Group(
        "learn", lambda rank, restart: ranks[rank](rank, restart), len(ranks), config.deadlines.train_s, _PINGS
    )
    if places is not None:
        group.on_stop = partial(remove_placement_group, places)
    return group


def _reserved(learner: LearnerConfig, resources: dict[str, Any]) -> PlacementGroup | None:
    """Reserves the ranks' places at once, so that they are near each other; it outlives the ranks that it holds."""
    bundle = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"], **resources["resources"]}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    if not bundle:
        return None
    return placement_group([dict(bundle) for _ in range(learner.num_ranks)], strategy=learner.placement.upper())


def _recorder(config: Config) -> Pool:
    """On this process's node, where the run directory is."""
    resources = _resources(0, 0, None)
    spawn = _spawning(
        "record", "recorder", partial(Recorder), resources, config.env, pings=True, scheduling_strategy=_here()
    )
    return Pool("record", spawn, PoolSize.fixed(1), config.deadlines.train_s, pings=_PINGS)


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _resources(cpus: float, gpus: float, node_resource: str | None) -> dict[str, Any]:
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": {node_resource: _SHARE} if node_resource else {}}


def _spawning(
    room: str,
    role: str,
    make: partial[Any],
    resources: dict[str, Any],
    env: Mapping[str, object],
    *,
    pings: bool = False,
    **options: Any,
) -> Spawn:
    """Starts actors of one role, which carry it in their names, with the user's ``env``; ``pings`` for those that are
    not asynchronous."""
    variables = {
        "OMP_NUM_THREADS": str(max(1, int(resources["num_cpus"]))),
        "TOKENIZERS_PARALLELISM": "false",
        **KERNEL_CACHES,
        **HEAP,
        logs.ROOM_VARIABLE: room,
        **{name: str(value) for name, value in env.items()},
    }
    # In a namespace of their own, names can be plain: other runs of the cluster have the same.
    options |= resources | {"namespace": f"opd-ray-{uuid.uuid4().hex[:8]}", "runtime_env": {"env_vars": variables}}
    # Once, not for each restart: Ray keeps every class that is made.
    actor_class = ray.remote(concurrency_groups={_PINGS: 1})(make.func) if pings else ray.remote(make.func)

    def spawn(number: int, restart: int) -> Member:
        name = f"{role}-{number}" + (f"-again-{restart}" if restart else "")
        return Member(actor_class.options(name=name, **options).remote(*make.args, **make.keywords), name)

    return spawn


async def up(config: Config, rooms: Rooms) -> None:
    """Waits for the groups that were started or restarted, and makes the learner's ranks know each other. Raises
    GroupLost when one is lost meanwhile."""
    limit = config.deadlines.start_s
    await together(*(_group_up(group, limit) for group in rooms.groups))


async def _group_up(group: Group, limit: float) -> None:
    if group.is_up:
        return
    await group.up(limit)
    if group.room == "learn":
        host, port = (await group.call_all("node_address", deadline_s=limit))[0]
        await group.call_all("setup", host, port, secrets.token_hex(32), deadline_s=limit)
    group.is_up = True


async def begin(
    config: Config,
    rooms: Rooms,
    stop_token_ids: Sequence[int],
    translations: Mapping[str, Translation] = MappingProxyType({}),
) -> None:
    """A run begins, or begins anew, in rooms that are up: the learner loads its student, scorers their checkpoints
    where they have others or followed a student, generators drop what they had left. No process starts anew.

    ``translations``: of teachers with another tokenizer, by role, how they are asked.
    The generators get the student's weights by the first broadcast. Raises RunError when the run needs a room that is
    not there, or one with other engines.
    """
    missing = [role for role in config.scorers if role not in rooms.scorers]
    if config.buffer.has_teacher_write and rooms.teacher_generators is None:
        missing.append("teacher_generate")
    if missing:
        raise RunError(
            f"this run needs the room {missing[0]}, but the rooms that are up are {', '.join(rooms.all)}; "
            "start rooms for all that any of the runs needs"
        )
    limit = config.deadlines.start_s
    # Those that follow the student receive every broadcast, whether this run asks them anything or not.
    known = {**config.teachers, REFERENCE: config.reference}
    scorers = config.scorers | {role: known[role] for role in rooms.followers if role in known}
    generators = [rooms.generators, *([rooms.teacher_generators] if config.buffer.has_teacher_write else [])]
    for pool in generators:
        pool.calls_at_once = config.rollout.calls_at_once
    await together(
        rooms.learner.call_all("begin", config, config.student.path, tuple(stop_token_ids), deadline_s=limit),
        *(
            rooms.scorers[role].begin(scorer, translations.get(role), deadline_s=limit)
            for role, scorer in scorers.items()
        ),
        *(pool.begin(_settings(config), deadline_s=limit) for pool in generators),
    )


async def abandon(rooms: Rooms) -> None:
    """Drops what the generators still work on for a run that ended or went back."""
    for pool in filter(None, (rooms.generators, rooms.teacher_generators)):
        await pool.call_all("abandon")
