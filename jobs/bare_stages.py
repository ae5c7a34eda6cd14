"""The stages of a run without the loop: engine, scorer and learner step in a process each, without Ray.

Each works on rollouts that the run trained on, with the threads that its actor has, on a machine where nothing else
runs: the generation engine with ``rollout.max_num_seqs`` responses under way all the time, of the lengths that they had
in the run; a scorer with the payloads as calls handed them over; the learner with whole steps. Neither queues nor
broadcasts, verifiers and metrics are in it. They work alone, one after the other, and then all of them side by side,
when they share caches and memory bandwidth as in a run.

What they could do together at best, in student tokens trained a second, is the lesser of

    cores / Σ c_stage                        every core is always at work, and at nothing else
    min (workers_stage / w_stage)            the slowest stage is, with all of its workers

where a worker of a stage takes c core-seconds (CPU time of its process; alone, or side by side) and, alone, w seconds
for a student token that is trained: for all that a step asks of it, golden and teacher's rollouts included, by the
step's student tokens.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from opd_ray.config import Config
from opd_ray.errors import InputError, RunError
from opd_ray.messages import Entry, GenerationRequest, SamplingSettings, Source
from opd_ray.rooms.memory import HEAP

_MEASURED_S, _WARM_S = 8.0, 2.0
_LIMIT_S = 900.0
"""For one stage's answer, its models' loading included."""
_ENDING_S = 10.0
Step = Sequence[Entry]
"""What one step trained on, with payloads in place of their refs."""
Response = tuple[list[int], list[int]]
"""The tokens of a prompt and of what was sampled."""


@dataclass(frozen=True)
class Bare:
    """What one worker of a stage takes for a student token that is trained."""

    core_s: float
    """Alone."""
    wall_s: float
    """Alone."""
    beside_core_s: float
    """Side by side with a worker of each other stage."""


class Work(NamedTuple):
    """Of a stage, to be done again and again."""

    do: Callable[[], object]
    tokens: float
    """Student tokens that are trained for each time."""
    answers: Sequence[Any] = ()


@dataclass(frozen=True)
class Ideal:
    """The pace that stages could have together, in student tokens trained a second."""

    tokens_per_s: float
    """By what stages take alone."""
    beside_tokens_per_s: float
    """By what they take side by side."""
    slowest: str
    slowest_tokens_per_s: float
    """Of the slowest stage with all of its workers, whatever the others take of the cores."""


def ideal(bare: Mapping[str, Bare], workers: Mapping[str, int], cores: float) -> Ideal:
    """By the formula above."""
    rates = {stage: workers[stage] / each.wall_s for stage, each in bare.items()}
    slowest = min(rates, key=rates.__getitem__)

    def shared(core_s: Iterable[float]) -> float:
        return min(cores / sum(core_s), rates[slowest])

    return Ideal(
        shared(each.core_s for each in bare.values()),
        shared(each.beside_core_s for each in bare.values()),
        slowest,
        rates[slowest],
    )


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
) -> dict[str, Bare]:
    """Every stage of a run, by room; ``config`` is resolved. Of the scores in ``steps`` only the roles count."""
    given = config, max_context_tokens, stop_token_ids
    entries = [entry for step in steps for entry in step]
    student_tokens = _tokens(entries, "student")
    stages: dict[str, _Stage] = {}
    with ExitStack() as processes:

        def begin(room: str, make: Callable[..., Work], *arguments: Any) -> None:
            stages[room] = processes.enter_context(_process(room, make, *arguments))

        begin("generate", _generating, *given, _responses(entries, "student"), 1.0)
        if config.buffer.has_teacher_write:
            share = _tokens(entries, "teacher") / student_tokens
            begin("teacher_generate", _generating, _writing(config), *given[1:], _responses(entries, "teacher"), share)
        scores: dict[tuple[str, int], Any] = {}
        for role in config.scorers:
            payloads = {
                id(entry.rollouts): (entry.rollouts, entry.meta.source) for entry in entries if role in entry.scores
            }
            begin(role, _scoring, *given, role, list(payloads.values()), student_tokens)
            answers = stages[role].answers
            scores |= {(role, payload): answer for payload, answer in zip(payloads, answers, strict=True)}
        scored = [
            [replace(each, scores={role: scores[role, id(each.rollouts)] for role in each.scores}) for each in step]
            for step in steps
        ]
        begin("learn", _learning, config, stop_token_ids, scored, student_tokens)
        for stage in stages.values():
            stage.go_on()
        beside = {room: stage.hear()[0] for room, stage in stages.items()}
    return {room: Bare(*stage.alone, beside[room]) for room, stage in stages.items()}


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


class _Stage:
    """A process that has done a stage's work alone, and will do it beside others."""

    def __init__(self, room: str, pipe: Any, process: Any) -> None:
        self._room, self._pipe, self._process = room, pipe, process
        self.answers: Sequence[Any] = self.hear()
        self.alone: tuple[float, float] = self.hear()

    def go_on(self) -> None:
        with self._alive():
            self._pipe.send(None)

    def hear(self) -> Any:
        with self._alive():
            if not self._pipe.poll(_LIMIT_S):
                raise RunError(f"stage {self._room} by itself: no answer within {_LIMIT_S:g} s; give smaller steps")
            return self._pipe.recv()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join(_ENDING_S)
            raise RunError(
                f"stage {self._room} by itself: its process ended with {self._process.exitcode}; what it said is above"
            ) from None


@contextmanager
def _process(room: str, make: Callable[..., Work], *arguments: Any) -> Iterator[_Stage]:
    """Of a stage, until it is left."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    os.environ |= HEAP  # as actors have it: read when a process begins
    process = spawning.Process(target=_work, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Stage(room, ours, process)
    finally:
        process.kill()  # gloo's threads do not expect the interpreter's end
        process.join()


def _work(pipe: Any, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """Alone, and, told to, beside others: until it is killed, as these may take longer to their figures."""
    work = make(*arguments)
    pipe.send(work.answers)
    pipe.send(_taking(work))
    pipe.recv()
    pipe.send(_taking(work))
    while not pipe.poll():  # nothing comes, but its end with the process that began this one
        work.do()


def _taking(work: Work) -> tuple[float, float]:
    """Core-seconds of this process, and seconds, for a token."""
    began, spent, times = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < _MEASURED_S:
        work.do()
        times += 1
    total = times * work.tokens
    return (time.process_time() - spent) / total, (time.perf_counter() - began) / total


def as_actor(cpus: float, env: Mapping[str, object]) -> None:
    """Threads and environment of an actor with so many CPUs. vLLM looks at the environment alone."""
    threads = max(1, int(cpus))
    os.environ |= {"OMP_NUM_THREADS": str(threads), **{name: str(value) for name, value in env.items()}}
    import torch  # after what it reads

    torch.set_num_threads(threads)


def _generating(
    config: Config,
    max_context_tokens: int,
    stop_token_ids: tuple[int, ...],
    responses: Sequence[Response],
    share: float,
) -> Work:
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
    return Work(step, rollout.max_num_seqs / share)


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


def _scoring(
    config: Config,
    max_context_tokens: int,
    stop_token_ids: tuple[int, ...],
    role: str,
    payloads: Sequence[tuple[Any, Source]],
    tokens: int,
) -> Work:
    """A scorer, which has answered once."""
    from opd_ray.score import make_scoring_engine
    from opd_ray.score.requests import score_requests
    from opd_ray.score.scorer import Scorer

    settings, requests = config.scorers[role], score_requests(config, stop_token_ids)
    as_actor(settings.cpus_per_actor, config.env)
    make = partial(make_scoring_engine, settings, max_context_tokens)
    scorer = Scorer(make_engine=make, scorer=settings, member=False)

    async def score() -> list[Any]:
        return [(await scorer.score(payload, requests[source][role]))[1] for payload, source in payloads]

    return Work(lambda: asyncio.run(score()), tokens, answers=asyncio.run(score()))


def _learning(config: Config, stop_token_ids: tuple[int, ...], steps: Sequence[Step], tokens: int) -> Work:
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
    return Work(lambda: [train(step) for step in range(len(steps))], tokens)
