"""StudentGenerator: one engine that samples responses and takes in new weights while it does.

The engine runs in a thread of its own, which alternates commands (submit, update, connect) and engine
steps; a command therefore always runs between two steps and never races with one.
Knows nothing of slots' accounting, of scoring or of training.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.engines import GenerationEngine
from opd_ray.errors import RunError
from opd_ray.messages import (
    ROLLOUT_SCHEMA,
    Finished,
    GenerationRequest,
    PromptGroup,
    RolloutMeta,
    SamplingSettings,
    TransferGroup,
    WeightManifest,
)
from opd_ray.metrics import is_repetitive
from opd_ray.node import this_node
from opd_ray.tasks import Task


class EngineThread:
    """Owns an engine: builds it, steps it while it has requests, runs commands in between.

    Every call returns a future. When the engine fails, all of them get its error: one that failed is not stepped again.
    """

    def __init__(self, make_engine: Callable[[], GenerationEngine]) -> None:
        # What came in and was not looked at yet: each runs on the engine and settles the future beside it.
        self._inbox: deque[tuple[Callable[[GenerationEngine], None], Future]] = deque()
        self._running: dict[str, Future] = {}
        self._drain: tuple[Callable[[GenerationEngine], Any], Future] | None = None
        self._held: deque[tuple[GenerationRequest, Future]] = deque()
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._started: Future = Future()
        threading.Thread(target=self._run, args=(make_engine,), name="engine", daemon=True).start()
        self._started.result()

    def submit(self, request: GenerationRequest) -> Future:
        """A future of the request's Finished."""
        done: Future = Future()
        return self._enqueue(partial(self._admit, request, done), done)

    def command(self, run: Callable[[GenerationEngine], Any]) -> Future:
        """Runs ``run(engine)`` between two steps."""
        done: Future = Future()
        return self._enqueue(partial(_settle, done, run), done)

    def drain_then(self, run: Callable[[GenerationEngine], Any]) -> Future:
        """Runs ``run(engine)`` when nothing is unfinished; requests that come meanwhile wait."""
        done: Future = Future()
        return self._enqueue(partial(self._hold, run, done), done)

    def _enqueue(self, handle: Callable[[GenerationEngine], None], done: Future) -> Future:
        done.set_running_or_notify_cancel()  # a caller that gives up must not make set_result() fail later
        with self._wake:
            if self._failure is not None:
                done.set_exception(RunError(f"the engine has failed before: {self._failure}"))
            else:
                self._inbox.append((handle, done))
                self._wake.notify()
        return done

    def _hold(self, run: Callable[[GenerationEngine], Any], done: Future, _: GenerationEngine) -> None:
        self._drain = (run, done)

    def _admit(self, request: GenerationRequest, done: Future, engine: GenerationEngine) -> None:
        if self._drain is not None:
            self._held.append((request, done))
            return
        try:
            engine.submit(request)
        except Exception as error:  # a request that the engine refuses fails alone
            done.set_exception(error)
        else:
            self._running[request.request_id] = done

    def _run(self, make_engine: Callable[[], GenerationEngine]) -> None:
        try:
            engine = make_engine()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while True:
                self._work(engine)
        except BaseException as error:
            with self._wake:
                self._failure = error
                waiting = [*self._running.values(), *(done for _, done in (*self._held, *self._inbox))]
                waiting += [self._drain[1]] if self._drain else []
            for done in waiting:
                done.set_exception(error)

    def _work(self, engine: GenerationEngine) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._running or self._drain)
            inbox, self._inbox = self._inbox, deque()
        for handle, _ in inbox:
            handle(engine)
        if self._drain is not None and not self._running:
            (run, done), self._drain = self._drain, None
            _settle(done, run, engine)
            held, self._held = self._held, deque()
            for request, waiting in held:
                self._admit(request, waiting, engine)
        if self._running:
            for finished in engine.step():
                self._running.pop(finished.request_id).set_result(finished)


def _settle(done: Future, run: Callable[[GenerationEngine], Any], engine: GenerationEngine) -> None:
    """Puts the outcome of ``run(engine)`` into ``done``."""
    try:
        done.set_result(run(engine))
    except Exception as error:
        done.set_exception(error)


class StudentGenerator:
    """Samples responses with the student's current weights (an async Ray actor)."""

    def __init__(
        self,
        *,
        make_engine: Callable[[], GenerationEngine],
        load_tokenizer: Callable[[], Any],
        task: Task,
        in_flight: str,
        repetition_window_chars: int,
        repetition_ratio: float,
    ) -> None:
        self._engine = EngineThread(make_engine)
        self._tokenizer = load_tokenizer()
        self._task = task
        self._in_flight = in_flight
        self._request_ids = itertools.count()
        self._is_repetitive = partial(is_repetitive, window_chars=repetition_window_chars, ratio=repetition_ratio)

    async def node(self) -> str:
        return this_node()

    async def generate(
        self, groups: Sequence[PromptGroup], sampling: SamplingSettings
    ) -> tuple[tuple[RolloutMeta, ...], pa.RecordBatch]:
        """Samples every response of every group; a row per response, in order."""
        owners = [(group, i) for group in groups for i in range(group.num_responses)]
        requests = [
            GenerationRequest(str(next(self._request_ids)), group.prompt_tokens, group.seed + i, sampling)
            for group, i in owners
        ]
        finished = await asyncio.gather(*(asyncio.wrap_future(self._engine.submit(each)) for each in requests))
        texts = self._tokenizer.batch_decode([each.tokens for each in finished], skip_special_tokens=True)
        metas = tuple(
            self._meta(group, i, each, text) for (group, i), each, text in zip(owners, finished, texts, strict=True)
        )
        return metas, _payload([group for group, _ in owners], finished, metas, texts)

    async def connect(self, group: TransferGroup) -> None:
        """Joins the group that weights are broadcast in."""
        await asyncio.wrap_future(self._engine.command(lambda engine: engine.connect(group)))

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Receives one broadcast, in the way that rollout.in_flight chose for unfinished responses."""
        unfinished = "restart" if self._in_flight == "abort" else "keep"
        schedule = self._engine.drain_then if self._in_flight == "drain" else self._engine.command
        await asyncio.wrap_future(schedule(lambda engine: engine.update_weights(manifest, unfinished)))

    def _meta(self, group: PromptGroup, index: int, finished: Finished, text: str) -> RolloutMeta:
        stopped = finished.finish_reason == "stop"
        return RolloutMeta(
            rollout_id=f"{group.slot}-{index}",
            slot=group.slot,
            prompt_id=group.prompt_id,
            source="student",
            num_prompt_tokens=len(group.prompt_tokens),
            num_response_tokens=len(finished.tokens),
            finish_reason=finished.finish_reason,
            correct=stopped and self._task.verify(text, group.row),
            repetitive=self._is_repetitive(text),
            oldest_version=int(finished.weight_versions[0]),
            newest_version=int(finished.weight_versions[-1]),
            mean_version=float(np.mean(finished.weight_versions)),
            mean_behaviour_logprob=float(np.mean(finished.logprobs)),
        )


def _payload(
    groups: Sequence[PromptGroup], finished: Sequence[Finished], metas: Sequence[RolloutMeta], texts: Sequence[str]
) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "rollout_id": [meta.rollout_id for meta in metas],
            "slot": [meta.slot for meta in metas],
            "prompt_id": [meta.prompt_id for meta in metas],
            "source": ["student"] * len(metas),
            "prompt_tokens": [group.prompt_tokens for group in groups],
            "response_tokens": [each.tokens for each in finished],
            "behaviour_logprobs": [each.logprobs for each in finished],
            "weight_versions": [each.weight_versions for each in finished],
            "finish_reason": [meta.finish_reason for meta in metas],
            "correct": [meta.correct for meta in metas],
            "text": list(texts),
        },
        schema=ROLLOUT_SCHEMA,
    )
