"""Starts the actors: placement, names, environment. The only module that applies ``ray.remote``."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_ray.actors.generator import GeneratorSettings, StudentGenerator, TeacherGenerator
from opd_ray.actors.learner import Learner
from opd_ray.actors.recorder import Recorder
from opd_ray.actors.scorer import Scorer
from opd_ray.config import Config, RolloutConfig, TeacherConfig
from opd_ray.engines.factory import load_tokenizer, make_generation_engine, make_scoring_engine
from opd_ray.errors import DeadlineError, OpdError, RunError
from opd_ray.golden import load_golden
from opd_ray.messages import REFERENCE, Entry, TransferGroup
from opd_ray.pipeline import Rooms
from opd_ray.pool import Member, Pool
from opd_ray.tasks import get_task

_CONCURRENT_CALLS = 1000
"""Calls that an async actor holds at once; what they wait for is the engine."""


def start_rooms(config: Config, *, namespace: str, max_context_tokens: int) -> Rooms:
    """Creates every actor of a run; returns at once, while they load their models."""
    scorers = {role: _scorers(role, config, namespace, max_context_tokens) for role in config.scorers}
    writes = config.buffer.uses_teacher_rollouts
    return Rooms(
        generators=start_generators(config, namespace=namespace, max_context_tokens=max_context_tokens),
        learner=_learner(config, namespace),
        scorers=scorers,
        teacher_generators=_teacher_generators(config, namespace, max_context_tokens) if writes else None,
        recorder=_recorder(config, namespace),
        followers=[pool for role, pool in scorers.items() if config.scorers[role].follows_student],
    )


def start_generators(config: Config, *, namespace: str, max_context_tokens: int) -> Pool:
    """The pool of student generators, as many as configured."""
    rollout = config.rollout
    make = partial(StudentGenerator, **_generator(config, config.student.path, rollout, max_context_tokens))
    return _generators("generate", "student-generator", make, config, namespace, rollout.num_generators)


def _teacher_generators(config: Config, namespace: str, max_context_tokens: int) -> Pool:
    """Generators on the teacher, as large as the student's."""
    rollout = dataclasses.replace(config.rollout, dtype=config.teacher.dtype)
    make = partial(TeacherGenerator, **_generator(config, config.teacher.path, rollout, max_context_tokens))
    return _generators("teacher_generate", "teacher-generator", make, config, namespace, rollout.teacher_generators)


def _generator(config: Config, path: str, rollout: RolloutConfig, max_context_tokens: int) -> dict[str, Any]:
    return {
        "make_engine": partial(make_generation_engine, path, rollout, config.weight_backend, max_context_tokens),
        "load_tokenizer": partial(load_tokenizer, config.student.path),
        "settings": _settings(config),
    }


def _settings(config: Config) -> GeneratorSettings:
    return GeneratorSettings(
        task=get_task(config.data.task),
        in_flight=config.rollout.in_flight,
        repetition_window_chars=config.metrics.repetition_window_chars,
        repetition_ratio=config.metrics.repetition_ratio,
        teacher_path=config.teacher.path,
    )


def _generators(room: str, role: str, make: partial[Any], config: Config, namespace: str, number: int) -> Pool:
    rollout = config.rollout
    gpus = rollout.gpus_per_generator * rollout.tensor_parallel_size
    members = [
        _actor(make, role, i, namespace, rollout.cpus_per_generator, gpus, max_concurrency=_CONCURRENT_CALLS)
        for i in range(number)
    ]
    return Pool(room, members, config.deadlines.generate_s)


def _scorers(role: str, config: Config, namespace: str, max_context_tokens: int) -> Pool:
    scorer = config.scorers[role]
    # A golden solution in the prompt makes sequences longer than any that the student sees.
    privileged = isinstance(scorer, TeacherConfig) and scorer.privileged
    longest = config.student.max_context_tokens if privileged else max_context_tokens
    make = partial(
        Scorer,
        make_engine=partial(make_scoring_engine, scorer, longest),
        scorer=scorer,
        weight_backend=config.weight_backend,
        member=scorer.follows_student,
    )
    cpus, gpus = scorer.cpus_per_actor, scorer.gpus_per_actor
    members = [
        _actor(make, f"{role}-scorer", i, namespace, cpus, gpus, max_concurrency=_CONCURRENT_CALLS)
        for i in range(scorer.num_actors)
    ]
    return Pool(role, members, config.deadlines.score_s)


def _learner(config: Config, namespace: str) -> Pool:
    learner = config.learner
    members = [
        _actor(partial(Learner, config, rank), "learner", rank, namespace, learner.cpus_per_rank, learner.gpus_per_rank)
        for rank in range(learner.num_ranks)
    ]
    return Pool("learn", members, config.deadlines.train_s)


def _recorder(config: Config, namespace: str) -> Pool:
    """On this process's node, where the run directory is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    member = _actor(partial(Recorder), "recorder", 0, namespace, 0, 0, scheduling_strategy=here)
    return Pool("record", [member], config.deadlines.train_s)


async def load_golden_entries(config: Config, eos_token_ids: Sequence[int]) -> tuple[list[Entry], dict[str, int]]:
    """The golden rollouts, read by a task so that they need not pass through the driver, and its count of the rows."""
    load = ray.remote(load_golden).options(num_cpus=0, num_returns=3)
    metas, payload, report = load.remote(config, tuple(eos_token_ids))
    limit = config.deadlines.start_s
    both = asyncio.gather(asyncio.wrap_future(metas.future()), asyncio.wrap_future(report.future()))
    try:
        rows, counts = await asyncio.wait_for(both, limit)
    except TimeoutError:
        raise DeadlineError(
            f"golden: {config.data.golden} was not read within {limit:g} s; see the task load_golden in the dashboard"
        ) from None
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, OpdError) else error from None
    return [Entry(meta, row, payload) for row, meta in enumerate(rows)], counts


def _actor(
    make: partial[Any], role: str, index: int, namespace: str, cpus: float, gpus: float, **options: Any
) -> Member:
    name = f"{role}-{index}"
    threads = max(1, int(cpus))
    handle = (
        ray.remote(make.func)
        .options(
            name=name,
            namespace=namespace,
            num_cpus=cpus,
            num_gpus=gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
            **options,
        )
        .remote(*make.args, **make.keywords)
    )
    return Member(handle, name)


async def connect(config: Config, rooms: Rooms, stop_token_ids: Sequence[int]) -> None:
    """Waits until every actor is up, forms the learner group, loads the student, and joins those that receive its
    weights: the learner is rank 0 of that group, then come the generators, then the scorers that follow it."""
    limit = config.deadlines.start_s
    await asyncio.gather(*(pool.locate(limit) for pool in (*rooms.all.values(), rooms.recorder)))
    host, port = (await rooms.learner.call_all("node_address", deadline_s=limit))[0]
    await rooms.learner.call_all("setup", host, port, deadline_s=limit)
    await _begin_learner(config, rooms, stop_token_ids)
    host, port = (await rooms.learner.call_all("node_address", deadline_s=limit))[0]
    widths = [(rooms.generators, config.rollout.tensor_parallel_size), *((pool, 1) for pool in rooms.followers)]
    world_size = 1 + sum(width * len(pool) for pool, width in widths)

    def group(rank: int) -> TransferGroup:
        return TransferGroup(
            backend=config.weight_backend,
            host=host,
            port=port,
            rank=rank,
            world_size=world_size,
            timeout_s=config.weights.timeout_s,
            bucket_bytes=config.weights.bucket_bytes,
        )

    joins = [rooms.learner.call_all("open_transport", group(0), deadline_s=limit)]
    next_rank = 1
    for pool, width in widths:
        ranks = [group(next_rank + width * i) for i in range(len(pool))]
        next_rank += width * len(pool)
        joins.append(pool.call_all("connect", each=ranks, deadline_s=limit))
    await asyncio.gather(*joins)


async def begin(config: Config, rooms: Rooms, stop_token_ids: Sequence[int]) -> None:
    """Another run in rooms that are up and connected: the learner loads its student, scorers their checkpoints where
    they have others or followed a student, generators drop what they had left. Nothing starts anew.

    The generators get the student's weights by the first broadcast. Raises RunError when the run needs a room that is
    not there, or one with other engines.
    """
    _check_rooms(config, rooms)
    limit = config.deadlines.start_s
    scorers = config.scorers
    # Those that follow the student receive every broadcast, whether this run asks them anything or not.
    known = {**config.teachers, REFERENCE: config.reference}
    scorers |= {pool.room: known[pool.room] for pool in rooms.followers if pool.room in known}
    generators = [rooms.generators]
    if rooms.teacher_generators is not None and config.buffer.uses_teacher_rollouts:
        generators.append(rooms.teacher_generators)
    await asyncio.gather(
        _begin_learner(config, rooms, stop_token_ids),
        *(rooms.scorers[role].call_all("begin", scorer, deadline_s=limit) for role, scorer in scorers.items()),
        *(pool.call_all("begin", _settings(config), deadline_s=limit) for pool in generators),
    )


async def _begin_learner(config: Config, rooms: Rooms, stop_token_ids: Sequence[int]) -> None:
    limit = config.deadlines.start_s
    await rooms.learner.call_all("begin", config, config.student.path, tuple(stop_token_ids), deadline_s=limit)


def _check_rooms(config: Config, rooms: Rooms) -> None:
    missing = [role for role in config.scorers if role not in rooms.scorers]
    if config.buffer.uses_teacher_rollouts and rooms.teacher_generators is None:
        missing.append("teacher_generate")
    if missing:
        raise RunError(
            f"this run needs the room {missing[0]}, but the rooms that are up are {', '.join(rooms.all)}; "
            "start rooms for all that any of the runs needs"
        )


def stop(*pools: Pool) -> None:
    """Ends every actor of the pools."""
    for pool in pools:
        for member in pool.members:
            ray.kill(member.handle)
