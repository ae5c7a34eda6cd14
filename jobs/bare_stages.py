"""The stages of a run alone: engine, scorer and learner step in a process each, one after the other, without Ray.

Each works on rollouts that the run trained on, with the threads that its actor has, on a machine where nothing else
runs: the generation engine with ``rollout.max_num_seqs`` responses under way all the time, of the lengths that they had
in the run; a scorer with the payloads as calls handed them over; the learner with whole steps. Neither queues nor
broadcasts, verifiers and metrics are in it.

What they could do together at best, in student tokens trained a second, is the lesser of

    cores / Σ c_stage                        every core is always at work, and at nothing else
    min (workers_stage / w_stage)            the slowest stage is, with all of its workers

where a worker of a stage, alone, takes c core-seconds (CPU time of its process) and w seconds for a student token that
is trained: for all that a step asks of it, golden and teacher's rollouts included, by the step's student tokens.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

from opd_ray.config import Config
from opd_ray.errors import InputError, RunError
from opd_ray.messages import Entry, GenerationRequest, SamplingSettings, Source
from opd_ray.rooms.memory import HEAP

_MEASURED_S, _WARM_S = 8.0, 2.0
_LIMIT_S = 900.0
"""For one stage, its models' loading included."""
Step = Sequence[Entry]
"""What one step trained on, with payloads in place of their refs."""
Response = tuple[list[int], list[int]]
"""The tokens of a prompt and of what was sampled."""


@dataclass(frozen=True)
class Alone:
    """What one worker of a stage takes for a student token that is trained."""

    core_s: float
    wall_s: float


@dataclass(frozen=True)
class Ideal:
    """The pace that stages could have together, in student tokens trained a second."""

    tokens_per_s: float
    slowest: str
    slowest_tokens_per_s: float
    """Of the slowest stage with all of its workers, whatever the others take of the cores."""


def ideal(alone: Mapping[str, Alone], workers: Mapping[str, int], cores: float) -> Ideal:
    """By the formula above."""
    rates = {stage: workers[stage] / each.wall_s for stage, each in alone.items()}
    slowest = min(rates, key=rates.__getitem__)
    shared = cores / sum(each.core_s for each in alone.values())
    return Ideal(min(shared, rates[slowest]), slowest, rates[slowest])


def check(config: Config) -> None:
    """Raises InputError for a run whose stages cannot be had alone."""
    if served := [role for role, scorer in config.scorers.items() if scorer.url]:
        raise InputError(
            f"--ideal runs each stage alone, but {served[0]}.url={config.scorers[served[0]].url} is a server"
        )
    if "student" not in config.sources:
        raise InputError("--ideal counts student tokens, but the run has none; mix in student rollouts")


def measure(
    config: Config, max_context_tokens: int, stop_token_ids: tuple[int, ...], steps: Sequence[Step]
) -> dict[str, Alone]:
    """Every stage of a run, by room; ``config`` is resolved. Of the scores in ``steps`` only the roles count."""
    given = config, max_context_tokens, stop_token_ids
    entries = [entry for step in steps for entry in step]
    student_tokens = _tokens(entries, "student")
    alone = {"generate": _elsewhere("generate", _generate, *given, _responses(entries, "student"), 1.0)}
    if config.buffer.has_teacher_write:
        share = _tokens(entries, "teacher") / student_tokens
        alone["teacher_generate"] = _elsewhere(
            "teacher_generate", _generate, _writing(config), *given[1:], _responses(entries, "teacher"), share
        )
    scores: dict[tuple[str, int], Any] = {}
    for role in config.scorers:
        payloads = {
            id(entry.rollouts): (entry.rollouts, entry.meta.source) for entry in entries if role in entry.scores
        }
        alone[role], answers = _elsewhere(role, _score, *given, role, list(payloads.values()), student_tokens)
        scores |= {(role, payload): answer for payload, answer in zip(payloads, answers, strict=True)}
    scored = [
        [replace(each, scores={role: scores[role, id(each.rollouts)] for role in each.scores}) for each in step]
        for step in steps
    ]
    alone["learn"] = _elsewhere("learn", _learn, config, stop_token_ids, scored, student_tokens)
    return alone


def _tokens(entries: Sequence[Entry], source: Source) -> int:
    return sum(entry.meta.num_response_tokens for entry in entries if entry.meta.source == source)


def _responses(entries: Sequence[Entry], source: Source) -> list[Response]:
    return [
        tuple(entry.rollouts[name][entry.row].as_py() for name in ("prompt_tokens", "response_tokens"))
        for entry in entries
        if entry.meta.source == source
    ]


def _writing(config: Config) -> Config:
    """As the teacher's generators have it."""
    rollout = replace(config.rollout, dtype=config.teacher.dtype)
    return replace(config, rollout=rollout, student=replace(config.student, path=config.teacher.path))


def _elsewhere(stage: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """What ``run`` returns in a process of its own."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    os.environ |= HEAP  # as actors have it: read when a process begins
    process = spawning.Process(target=_answer, args=(theirs, run, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_LIMIT_S):
            raise RunError(f"stage {stage} alone: no answer within {_LIMIT_S:g} s; give smaller steps")
        return ours.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"stage {stage} alone: its process ended with {process.exitcode}; what it said is above"
        ) from None
    finally:
        process.kill()  # gloo's threads do not expect the interpreter's end
        process.join()


def _answer(pipe: Any, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(run(*arguments))
    time.sleep(_LIMIT_S)  # until it is killed


def _taking(work: Callable[[], object], tokens: float) -> Alone:
    """Does ``work`` again and again; ``tokens``: that are trained for each time."""
    began, spent, times = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < _MEASURED_S:
        work()
        times += 1
    total = times * tokens
    return Alone((time.process_time() - spent) / total, (time.perf_counter() - began) / total)


def as_actor(cpus: float, env: Mapping[str, object]) -> None:
    """Threads and environment of an actor with so many CPUs. vLLM looks at the environment alone."""
    threads = max(1, int(cpus))
    os.environ |= {"OMP_NUM_THREADS": str(threads), **{name: str(value) for name, value in env.items()}}
    import torch  # after what it reads

    torch.set_num_threads(threads)


def _generate(
    config: Config,
    max_context_tokens: int,
    stop_token_ids: tuple[int, ...],
    responses: Sequence[Response],
    share: float,
) -> Alone:
    """An engine that is full; ``share``: tokens that it has to make for each that the student trains on."""
    from opd_ray.generate import make_generation_engine

    rollout = config.rollout
    as_actor(rollout.cpus_per_generator, config.env)
    engine = make_generation_engine(config.student.path, rollout, max_context_tokens)
    numbers = count()

    def submit(prompt: Sequence[int], num_tokens: int) -> None:
        sampling = SamplingSettings(rollout.temperature, rollout.top_p, num_tokens, (), config.student_top_k)
        engine.submit(GenerationRequest(str(number := next(numbers)), tuple(prompt), number, sampling))

    following = again(responses)
    for prompt, num_tokens in under_way(responses, rollout.max_num_seqs):
        submit(prompt, num_tokens)

    def step() -> None:  # a token of each
        for _ in engine.step():
            submit(*next(following))

    warm = time.perf_counter() + _WARM_S
    while time.perf_counter() < warm:
        step()
    return _taking(step, rollout.max_num_seqs / share)


def again(responses: Sequence[Response]) -> Iterator[tuple[list[int], int]]:
    """Prompts and lengths of responses, over and over, each time with other prompts: nothing of them is in a cache."""
    for turn in count():
        for prompt, response in responses:
            first = turn % len(prompt)
            yield prompt[first:] + prompt[:first], len(response)


def under_way(responses: Sequence[Response], number: int) -> list[tuple[list[int], int]]:
    """Prefixes and what is left of responses, as an engine has them that has been full for long: a response is there
    for as many steps as it has tokens, and at any of them."""
    rng = random.Random(0)
    chosen = rng.choices(responses, [len(response) for _, response in responses], k=number)
    begun = [rng.randrange(len(response)) for _, response in chosen]
    return [
        (prompt + response[:done], len(response) - done) for (prompt, response), done in zip(chosen, begun, strict=True)
    ]


def _score(
    config: Config,
    max_context_tokens: int,
    stop_token_ids: tuple[int, ...],
    role: str,
    payloads: Sequence[tuple[Any, Source]],
    tokens: int,
) -> tuple[Alone, list[Any]]:
    """A scorer, and its answers."""
    from opd_ray.score import make_scoring_engine
    from opd_ray.score.requests import score_requests
    from opd_ray.score.scorer import Scorer

    settings, requests = config.scorers[role], score_requests(config, stop_token_ids)
    as_actor(settings.cpus_per_actor, config.env)
    make = partial(make_scoring_engine, settings, max_context_tokens)
    scorer = Scorer(make_engine=make, scorer=settings, member=False)

    async def score() -> list[Any]:
        return [(await scorer.score(payload, requests[source][role]))[1] for payload, source in payloads]

    answers = asyncio.run(score())
    return _taking(lambda: asyncio.run(score()), tokens), answers


def _learn(config: Config, stop_token_ids: tuple[int, ...], steps: Sequence[Step], tokens: int) -> Alone:
    """One rank, with all of the steps."""
    as_actor(config.learner.cpus_per_rank, config.env)

    from opd_ray.buffer.mixture import Mixture
    from opd_ray.buffer.plan import plan_step
    from opd_ray.learn.learner import Learner

    settings = replace(config.learner, num_ranks=1)
    learner = Learner(replace(config, learner=settings), 0)
    learner.setup("127.0.0.1", 0, "")
    learner.begin(replace(config, learner=settings), config.student.path, stop_token_ids)

    def train(step: int) -> None:
        [plan] = plan_step(
            steps[step],
            step=step,
            coefficients=Mixture(config).coefficients(step),
            num_ranks=1,
            micro_batch_tokens=settings.micro_batch_tokens,
            packing=settings.packing,
        )
        learner.train_step(plan, lambda refs: refs)

    train(0)
    return _taking(lambda: [train(step) for step in range(len(steps))], tokens)
