"""Generators: an engine that samples responses; the student's takes in new weights while it does.

The engine runs in a thread of its own, which alternates commands (submit, install, abandon) and engine
steps; a command therefore always runs between two steps and never races with one. Weights come in beside them.
Knows nothing of slots' accounting, of scoring or of training.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.generate.engine import GenerationEngine, Unfinished
from opd_ray.generate.engine_thread import EngineThread
from opd_ray.messages import (
    ROLLOUT_SCHEMA,
    Finished,
    GenerationRequest,
    MemoryUse,
    PromptGroup,
    RolloutMeta,
    SamplingSettings,
    Source,
    Spans,
    TransferGroup,
    WeightManifest,
)
from opd_ray.repetition import is_repetitive, tail_period
from opd_ray.rooms import logs, spans
from opd_ray.rooms.memory import own_memory
from opd_ray.rooms.node import this_actor, this_node
from opd_ray.tasks import Task
from opd_ray.tasks.judge import Judge

_log = logs.get(__name__)

_UNFINISHED: dict[str, Unfinished] = {
    "keep": "keep",
    "recompute": "recompute",
    "drain": "keep",  # and there is nothing
    "abort": "restart",
}
"""What becomes of unfinished responses at a weight update, by rollout.in_flight."""
_OF_META = ("rollout_id", "slot", "prompt_id", "source", "finish_reason", "correct")
"""Columns of a payload that repeat its metas."""


@dataclass(frozen=True)
class GeneratorSettings:
    """What may change from run to run without another engine."""

    task: Task
    """Verifies the answers."""
    in_flight: str
    """rollout.in_flight."""
    repetition: tuple[int, float]
    """L in characters and τ of rep(o)."""


class Generator:
    """Samples responses (an async Ray actor). Its subclasses say for whom."""

    source: Source
    id_prefix: str
    """Of the index in a rollout's id, which is unlike that of any other source's rollout."""

    def __init__(
        self,
        *,
        make_engine: Callable[[], GenerationEngine],
        load_tokenizer: Callable[[], Any],
        settings: GeneratorSettings,
    ) -> None:
        self._engine = EngineThread(make_engine)
        self._tokenizer = load_tokenizer()
        self._settings = settings
        self._judge = Judge(settings.task)
        self._name = this_actor()
        self._request_ids = itertools.count()

    async def node(self) -> str:
        return this_node()

    async def memory(self) -> MemoryUse:
        return own_memory()

    async def timeline(self) -> Spans:
        return spans.collect()

    async def begin(self, settings: GeneratorSettings) -> None:
        """Another run: drops what is left of the one before."""
        await self.abandon()
        self._judge.close()
        self._settings, self._judge = settings, Judge(settings.task)

    async def generate(
        self, groups: Sequence[PromptGroup], sampling: SamplingSettings
    ) -> tuple[tuple[RolloutMeta, ...], pa.RecordBatch]:
        """Samples every response of every group; a row per response, in order. Raises RunError when abandoned."""
        owners = [(group, group.first_response + i) for group in groups for i in range(group.num_responses)]
        requests = [
            GenerationRequest(
                str(next(self._request_ids)), group.prompt_tokens, group.seed + i, _up_to(group, sampling)
            )
            for group, i in owners
        ]
        finished = [
            _cut(group, each)
            for (group, _), each in zip(owners, await asyncio.gather(*map(self._respond, requests)), strict=True)
        ]
        texts = self._tokenizer.batch_decode([each.tokens for each in finished], skip_special_tokens=True)
        verdicts = await self._verdicts([group for group, _ in owners], finished, texts)
        metas = tuple(
            self._meta(group, i, each, text, verdict)
            for (group, i), each, text, verdict in zip(owners, finished, texts, verdicts, strict=True)
        )
        return metas, _payload([group for group, _ in owners], finished, metas, texts)

    async def abandon(self) -> int:
        """Drops every unfinished response, whose callers get a RunError; returns how many there were."""
        return await asyncio.wrap_future(self._engine.abandon())

    async def _verdicts(
        self, groups: Sequence[PromptGroup], finished: Sequence[Finished], texts: Sequence[str]
    ) -> list[bool | None]:
        """Of each response; one that did not end by itself is not judged."""
        stopped = [each.finish_reason == "stop" for each in finished]
        asked = [(text, group.row) for text, group, stop in zip(texts, groups, stopped, strict=True) if stop]
        verdicts = iter(await self._judge.verify(asked))
        return [next(verdicts) if stop else False for stop in stopped]

    async def _respond(self, request: GenerationRequest) -> Finished:
        return await asyncio.wrap_future(self._engine.submit(request))

    def _meta(self, group: PromptGroup, index: int, finished: Finished, text: str, verdict: bool | None) -> RolloutMeta:
        versions = finished.weight_versions if len(finished.weight_versions) else [-1]
        return RolloutMeta(
            rollout_id=f"{group.slot}-{self.id_prefix}{index}",
            slot=group.slot,
            prompt_id=group.prompt_id,
            source=self.source,
            num_prompt_tokens=len(group.prompt_tokens),
            num_response_tokens=len(finished.tokens),
            finish_reason=finished.finish_reason,
            correct=bool(verdict),
            repetitive=finished.finish_reason == "repetition" or is_repetitive(text, *self._settings.repetition),
            oldest_version=int(versions[0]),
            mean_version=float(np.mean(versions)),
            mean_behaviour_logprob=float(np.mean(finished.logprobs)) if len(finished.logprobs) else math.nan,
            teacher=group.teacher,
            tail_period=tail_period(finished.tokens),
            worker=self._name,
            no_verdict=verdict is None,
            horizon=group.horizon,
            whole=group.horizon is None or group.probe,
        )


def _up_to(group: PromptGroup, sampling: SamplingSettings) -> SamplingSettings:
    """Sampling settings of a group, with its horizon as their budget."""
    if group.horizon is None or group.probe:
        return sampling
    return replace(sampling, max_response_tokens=min(group.horizon, sampling.max_response_tokens))


def _cut(group: PromptGroup, finished: Finished) -> Finished:
    """What the engine takes for the end of the budget is the horizon; what ends before it had no room for more."""
    if group.probe or finished.finish_reason != "length" or len(finished.tokens) != group.horizon:
        return finished
    return replace(finished, finish_reason="horizon")


def _payload(
    groups: Sequence[PromptGroup], finished: Sequence[Finished], metas: Sequence[RolloutMeta], texts: Sequence[str]
) -> pa.RecordBatch:
    columns = {
        **{name: [getattr(meta, name) for meta in metas] for name in _OF_META},
        "prompt_tokens": [group.prompt_tokens for group in groups],
        "response_tokens": [each.tokens for each in finished],
        "behaviour_logprobs": [each.logprobs for each in finished],
        "weight_versions": [each.weight_versions for each in finished],
        "topk_ids": [() if each.topk_ids is None else each.topk_ids.ravel() for each in finished],
        "privileged_prompt_tokens": [group.privileged_prompt_tokens for group in groups],
        "text": list(texts),
    }
    return pa.RecordBatch.from_pydict(columns, schema=ROLLOUT_SCHEMA)


class StudentGenerator(Generator):
    """Samples responses with the student's current weights."""

    source, id_prefix = "student", ""

    async def connect(self, group: TransferGroup) -> None:
        """Joins the group that weights are broadcast in."""
        await asyncio.wrap_future(self._engine.connect(group))

    async def drain(self) -> None:
        """Finishes what is unfinished; what comes meanwhile is begun after the next weight update."""
        await asyncio.wrap_future(self._engine.drain())

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Receives one broadcast; unfinished responses go on or begin again, as rollout.in_flight says."""
        await asyncio.wrap_future(self._engine.update(manifest, _UNFINISHED[self._settings.in_flight]))
        logs.at(version=manifest.version)
        _log.info("has weights of version %d", manifest.version)


class TeacherGenerator(Generator):
    """Samples responses with the teacher's weights: rollouts to imitate, without a policy that is a student's."""

    source, id_prefix = "teacher", "t"

    async def _respond(self, request: GenerationRequest) -> Finished:
        return replace(await super()._respond(request), logprobs=(), weight_versions=())
