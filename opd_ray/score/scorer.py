"""Scorer: one model that gives its log-probs of rollouts. Every teacher and the reference are pools of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from opd_ray.config import ScorerConfig
from opd_ray.errors import EngineFailed, OpdError, RunError
from opd_ray.messages import (
    MOST_VALUES,
    MemoryUse,
    ScoreRequest,
    ServerState,
    Spans,
    TransferGroup,
    WeightManifest,
    score_schema,
)
from opd_ray.rooms import logs, spans
from opd_ray.rooms.memory import own_memory
from opd_ray.rooms.node import this_node
from opd_ray.rooms.threads import in_thread
from opd_ray.score.engine import Rollout, Scores, ScoringEngine

if TYPE_CHECKING:
    from opd_ray.score.follower import Follower
    from opd_ray.score.translation import Translation, Translator

_log = logs.get(__name__)


class Worker:
    """The one thread that an engine lives in: urgent calls go first, the others wait while it is on hold."""

    def __init__(self, make_engine: Callable[[], ScoringEngine]) -> None:
        self.on_hold: Callable[[], bool] = lambda: False
        """Only an urgent call can change the answer."""
        self._thread = ThreadPoolExecutor(1, "engine")
        self._turn = asyncio.Condition()
        self._busy, self._num_urgent = False, 0
        self.engine = self._thread.submit(make_engine).result()

    async def call(self, run: Callable[..., Any], *args: Any, urgent: bool = False) -> Any:
        """The outcome of ``run(*args)``."""

        def may_run() -> bool:
            return not self._busy and (urgent or not (self._num_urgent or self.on_hold()))

        async with self._turn:
            self._num_urgent += urgent
            try:
                await self._turn.wait_for(may_run)
            finally:  # also of a caller that gives up
                self._num_urgent -= urgent
                self._turn.notify_all()
            self._busy = True
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run, *args)
        finally:
            async with self._turn:
                self._busy = False
                self._turn.notify_all()


class Scorer:
    """Scores batches of rollouts (an async Ray actor); new weights come in beside them, and are installed ahead of the
    batches that wait.

    After an installation that failed half way they wait until one succeeds: a part of new weights is nobody's.

    ``make_engine`` builds the engine on ``scorer.path``. One that is a ``member`` of the weight-transfer group takes
    part in every broadcast, whether its run's ``scorer.update`` follows the student or not.
    """

    def __init__(self, *, make_engine: Callable[[], ScoringEngine], scorer: ScorerConfig, member: bool) -> None:
        self._worker = Worker(make_engine)
        self._engine = self._worker.engine
        self._scorer = scorer
        self._receiving = asyncio.Lock()
        """Held by whoever joins a group, takes a broadcast in or changes what it is for."""
        self._translation: Translation | None = None
        self._translator: Translator | None = None
        self._follower: Follower | None = None
        if member:  # torch is loaded by those that need it
            from opd_ray.score.follower import Follower

            self._follower = follower = Follower(self._engine.parameters(), scorer)
            self._worker.on_hold = lambda: not follower.whole

    async def node(self) -> str:
        return this_node()

    async def memory(self) -> MemoryUse:
        return own_memory()

    async def timeline(self) -> Spans:
        return spans.collect()

    async def begin(self, scorer: ScorerConfig, translation: Translation | None = None) -> None:
        """Another run: its checkpoint, unless that is at hand and unchanged, and its way to follow the student;
        ``translation`` where the student has another tokenizer."""
        async with self._receiving:
            await self._worker.call(self._begin, scorer, translation, urgent=True)

    async def score(self, rollouts: pa.RecordBatch, request: ScoreRequest) -> tuple[int, pa.RecordBatch]:
        """Returns the number of response tokens scored, and a row of SCORE_SCHEMA per rollout.

        Raises RunError for a rollout without what ``request`` needs: topk_ids (given) or privileged_prompt_tokens.
        """
        return await self._worker.call(self._score, rollouts, request)

    async def servers(self) -> tuple[ServerState, ...]:
        """How the servers fare that an engine of theirs asks; answered beside its work."""
        return self._engine.servers()

    async def connect(self, group: TransferGroup) -> None:
        """Joins the group that weights are broadcast in."""
        async with self._receiving:
            await in_thread(self._following().connect, group)
        _log.info("joined the weight-transfer group of %d as rank %d", group.world_size, group.rank)

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Receives one broadcast, and does with it what ``update`` says."""
        async with self._receiving:
            await in_thread(self._following().receive, manifest)
            await self._worker.call(self._following().install, urgent=True)
        logs.at(version=manifest.version)
        _log.info("follows weights of version %d", manifest.version)

    async def snapshot(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """What a later run needs to follow the student from here on: {"version"}, and float32 weights by name."""
        return await self._worker.call(self._following().snapshot, urgent=True)

    async def restore(self, facts: dict[str, int], arrays: dict[str, np.ndarray]) -> None:
        """Goes on from a ``snapshot``. Raises RunError when it is of another model."""
        await self._worker.call(self._following().restore, facts, arrays, urgent=True)

    def _following(self) -> Follower:
        if self._follower is None:
            raise RunError(
                "this scorer is no member of the weight-transfer group; start it with update other than fixed"
            )
        return self._follower

    @spans.spanned("load")
    def _begin(self, scorer: ScorerConfig, translation: Translation | None) -> None:
        moved = self._scorer.follows_student and (self._following().version > 0 or not self._following().whole)
        if moved or scorer.path != self._scorer.path:
            self._engine.load(scorer.path)
        self._scorer = scorer
        if translation != self._translation:
            from opd_ray.score.translation import Translator  # transformers: for those that need it

            self._translator = Translator.of(translation) if translation else None
            self._translation = translation
        if self._follower is not None:
            self._follower.follow(self._engine.parameters(), scorer)

    def _score(self, rollouts: pa.RecordBatch, request: ScoreRequest) -> tuple[int, pa.RecordBatch]:
        try:
            with spans.span("score", rollouts=len(rollouts)):
                if self._translator is not None:
                    scores = self._translator.score(self._engine, rollouts, request)
                else:
                    scores = self._engine.score(_sequences(rollouts, request), request)
        except (OpdError, ValueError):
            raise
        except Exception as error:  # of a device or an engine that may be broken: another worker may do better
            raise EngineFailed(f"the engine failed: {type(error).__name__}: {error}") from error
        return sum(len(each.logprobs) for each in scores), _payload(rollouts["rollout_id"], scores)


def _sequences(rollouts: pa.RecordBatch, request: ScoreRequest) -> list[Rollout]:
    prompts = rollouts["privileged_prompt_tokens" if request.privileged else "prompt_tokens"]
    columns = zip(rollouts["rollout_id"], prompts, rollouts["response_tokens"], rollouts["topk_ids"], strict=True)
    sequences = []
    for rollout_id, prompt, response, topk_ids in columns:
        if request.privileged and len(prompt) == 0:
            raise RunError(
                f"rollout {rollout_id} has no privileged_prompt_tokens, but a privileged teacher is to score it; "
                "give its prompt a golden solution in data.golden"
            )
        if request.given and (len(topk_ids) == 0) != (len(response) == 0):
            raise RunError(
                f"rollout {rollout_id} carries no topk_ids, but their log-probs are asked for; sample it with top_k"
            )
        tokens = np.asarray(response.values)
        given = np.asarray(topk_ids.values).reshape(len(tokens), -1) if request.given else None
        sequences.append(Rollout(np.asarray(prompt.values), tokens, given))
    return sequences


def _payload(rollout_ids: pa.Array, scores: Sequence[Scores]) -> pa.RecordBatch:
    hidden = [each.hidden for each in scores]
    half = any(states.dtype == np.float16 and states.size for states in hidden)
    for rollout_id, states in zip(rollout_ids, hidden, strict=True):
        if not np.isfinite(states).all():
            raise RunError(
                f"rollout {rollout_id}: its hidden states are not finite"
                + (" in float16; score with dtype=float32" if half else "")
            )
    schema = score_schema(pa.float16() if half else pa.float32())
    of_scores = (field for field in schema if field.name != "rollout_id")
    columns = [_lists([getattr(each, field.name).ravel() for each in scores], field) for field in of_scores]
    return pa.RecordBatch.from_arrays([rollout_ids, *columns], schema=schema)


def _lists(rows: Sequence[np.ndarray], field: pa.Field) -> pa.ListArray:
    """A list column from one array per row."""
    if (total := sum(map(len, rows))) > MOST_VALUES:
        raise RunError(
            f"{len(rows)} rollouts have {total} values of {field.name}, more than one batch can hold "
            f"({MOST_VALUES}); lower rollout.prompts_per_call"
        )
    return pa.array(rows, type=field.type)
