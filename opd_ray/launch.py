"""Starts the actors: placement, names, environment. The only module that applies ``ray.remote``."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_ray.actors.generator import StudentGenerator
from opd_ray.actors.learner import Learner
from opd_ray.actors.recorder import Recorder
from opd_ray.actors.scorer import Scorer
from opd_ray.config import Config, ScorerConfig
from opd_ray.engines.factory import load_tokenizer, make_generation_engine, make_scoring_engine
from opd_ray.errors import DeadlineError
from opd_ray.golden import load_golden
from opd_ray.messages import Entry, TransferGroup
from opd_ray.pipeline import Rooms
from opd_ray.pool import Member, Pool
from opd_ray.tasks import get_task


def start_rooms(config: Config, *, namespace: str, max_context_tokens: int) -> Rooms:
    """Creates every actor of a run; returns at once, while they load their models."""
    loss, deadlines = config.loss, config.deadlines
    on_policy = config.buffer.prompts_per_step > 0

    def scorers(role: str, scorer: ScorerConfig) -> Pool:
        return _scorers(role, scorer, namespace, max_context_tokens, deadlines.score_s)

    return Rooms(
        generators=start_generators(config, namespace=namespace, max_context_tokens=max_context_tokens),
        learner=_learner(config, namespace),
        teacher=scorers("teacher", config.teacher) if on_policy else None,
        reference=scorers("reference", config.reference) if loss.needs_reference else None,
    )


def start_generators(config: Config, *, namespace: str, max_context_tokens: int) -> Pool:
    """The pool of student generators, as many as configured."""
    rollout = config.rollout
    actor = partial(
        StudentGenerator,
        make_engine=partial(
            make_generation_engine, config.student.path, rollout, config.weight_backend, max_context_tokens
        ),
        load_tokenizer=partial(load_tokenizer, config.student.path),
        task=get_task(config.data.task),
        in_flight=rollout.in_flight,
        repetition_window_chars=config.metrics.repetition_window_chars,
        repetition_ratio=config.metrics.repetition_ratio,
    )
    gpus = rollout.gpus_per_generator * rollout.tensor_parallel_size
    members = [
        _actor(actor, "student-generator", i, namespace, rollout.cpus_per_generator, gpus, max_concurrency=1000)
        for i in range(rollout.num_generators)
    ]
    return Pool("generate", members, config.deadlines.generate_s)


def start_recorder(directory: Path, *, namespace: str, deadline_s: float) -> Pool:
    """The writer of the rollout log, on this process's node, where the run directory is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    member = _actor(partial(Recorder, directory), "recorder", 0, namespace, 0, 0, scheduling_strategy=here)
    return Pool("record", [member], deadline_s)


async def load_golden_entries(config: Config, eos_token_id: int) -> list[Entry]:
    """The golden rollouts, read by a task so that they need not pass through the driver."""
    load = ray.remote(load_golden).options(num_cpus=0, num_returns=2)
    metas, payload = load.remote(config.data.golden, get_task(config.data.task), config.student.path, eos_token_id)
    limit = config.deadlines.start_s
    try:
        rows = await asyncio.wait_for(asyncio.wrap_future(metas.future()), limit)
    except TimeoutError:
        raise DeadlineError(
            f"golden: {config.data.golden} was not read within {limit:g} s; see the task load_golden in the dashboard"
        ) from None
    return [Entry(meta, row, payload) for row, meta in enumerate(rows)]


def _scorers(role: str, scorer: ScorerConfig, namespace: str, max_context_tokens: int, deadline_s: float) -> Pool:
    actor = partial(
        Scorer,
        make_engine=partial(make_scoring_engine, scorer, max_context_tokens),
        eos_map=scorer.eos_map,
    )
    members = [
        _actor(actor, f"{role}-scorer", i, namespace, scorer.cpus_per_actor, scorer.gpus_per_actor)
        for i in range(scorer.num_actors)
    ]
    return Pool(role, members, deadline_s)


def _learner(config: Config, namespace: str) -> Pool:
    learner = config.learner
    members = [
        _actor(
            partial(Learner, config, config.student.path, rank),
            "learner",
            rank,
            namespace,
            learner.cpus_per_rank,
            learner.gpus_per_rank,
        )
        for rank in range(learner.num_ranks)
    ]
    return Pool("learn", members, config.deadlines.train_s)


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


async def connect(config: Config, rooms: Rooms) -> None:
    """Waits until every actor is up, forms the learner group, and joins generators to its broadcast."""
    limit = config.deadlines.start_s
    await asyncio.gather(*(pool.locate(limit) for pool in rooms.all.values()))
    host, port = (await rooms.learner.call_all("node_address", deadline_s=limit))[0]
    await rooms.learner.call_all("setup", host, port, deadline_s=limit)
    host, port = (await rooms.learner.call_all("node_address", deadline_s=limit))[0]
    width = config.rollout.tensor_parallel_size

    def group(rank: int) -> TransferGroup:
        return TransferGroup(
            backend=config.weight_backend,
            host=host,
            port=port,
            rank=rank,
            world_size=1 + width * len(rooms.generators),
            timeout_s=config.weights.timeout_s,
            bucket_bytes=config.weights.bucket_bytes,
        )

    ranks = [group(1 + width * i) for i in range(len(rooms.generators))]
    await asyncio.gather(
        rooms.learner.call_all("open_transport", group(0), deadline_s=limit),
        rooms.generators.call_all("connect", each=ranks, deadline_s=limit),
    )


def stop(*pools: Pool) -> None:
    """Ends every actor of the pools."""
    for pool in pools:
        for member in pool.members:
            ray.kill(member.handle)
