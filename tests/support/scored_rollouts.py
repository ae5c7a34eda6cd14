"""Random rollouts with random scores, for tests of batching, of the objective and of the learner.

Every score of a role comes from one place: random hidden states through the role's own output layer, so that top-k,
given ids, P(stop) and hidden states tell of the same distribution.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.messages import ROLLOUT_SCHEMA, SCORE_SCHEMA, Entry, RolloutMeta, Source
from opd_ray.models.heads import FrozenHead

VOCABULARY = 32  # of conftest's tiny_model
HIDDEN = 16
LOOPED = 5
"""The token of loops."""

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Scoring:
    """What the scorers were asked."""

    top_k: int = 8
    given: int = 0
    """k' of the rollouts' own topk_ids."""
    hidden: bool = False
    hidden_size: int = HIDDEN
    stop_token_ids: tuple[int, ...] = ()
    heads: dict[str, FrozenHead] = field(default_factory=dict)
    """Output layers of the roles, where they are not those of :func:`head_of`."""
    roles: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"student": ("teacher", "reference")})
    """Source to the roles that score it."""


def head_of(role: str, hidden_size: int = HIDDEN) -> FrozenHead:
    """The output layer of a role's model."""
    generator = torch.Generator().manual_seed(zlib.crc32(role.encode()))
    return FrozenHead(torch.randn(VOCABULARY, hidden_size, generator=generator) * 0.4, None)


def scored_entries(
    student: Sizes,
    golden: Sizes = (),
    teacher: Sizes = (),
    *,
    seed: int = 0,
    top_k: int = 8,
    scoring: Scoring | None = None,
    truncated: Sequence[int] = (),
    looping: Sequence[int] = (),
    put: Callable[[Any], Any] = lambda batch: batch,
) -> list[Entry]:
    """Entries of (prompt tokens, response tokens) pairs; ``put`` turns RecordBatches into refs.

    The student's are spread over two payloads in reverse order, so that rows and metas are out of step. ``truncated``
    and ``looping`` are indices into ``student``: of those that ran out of their budget, and of those that say one token
    over and over, which the engine ended.
    """
    rng = np.random.default_rng(seed)
    scoring = scoring or Scoring(top_k=top_k)
    half = len(student) // 2
    entries: list[Entry] = []
    for source, sizes, prefix in (
        ("student", student[:half], "s0"),
        ("student", student[half:], "s1"),
        ("golden", golden, "g"),
        ("teacher", teacher, "t"),
    ):
        cut, loops = ([index - len(entries) for index in each] for each in (truncated, looping))
        entries += _payload(sizes, source, prefix, rng, scoring, cut, loops, put)
    return entries


def _payload(
    sizes: Sizes,
    source: Source,
    prefix: str,
    rng: np.random.Generator,
    scoring: Scoring,
    truncated: Sequence[int],
    looping: Sequence[int],
    put: Callable[[Any], Any],
) -> list[Entry]:
    if not sizes:
        return []
    on_policy = source == "student"
    rows: list[dict[str, Any]] = []
    scores: dict[str, list[dict[str, Any]]] = {role: [] for role in scoring.roles.get(source, ())}
    for index, (num_prompt, num_response) in enumerate(sizes):
        tokens = rng.integers(0, VOCABULARY, num_prompt + num_response).astype(np.int32)
        response = tokens[num_prompt:]
        ended = "length" if on_policy and index in truncated else "stop"
        if on_policy and index in looping:
            response[:], ended = LOOPED, "repetition"
        given = np.array([rng.permutation(VOCABULARY)[: scoring.given] for _ in response], np.int32)
        rows.append(
            {
                "rollout_id": f"{prefix}-{index}",
                "slot": index,
                "prompt_id": str(index),
                "source": source,
                "prompt_tokens": tokens[:num_prompt],
                "response_tokens": response,
                "behaviour_logprobs": -3.5 + 0.1 * rng.normal(size=num_response) if on_policy else [],
                "weight_versions": [0] * num_response if on_policy else [],
                "topk_ids": given.flatten() if on_policy else [],
                "privileged_prompt_tokens": [],
                "finish_reason": ended,
                "correct": True,
                "text": "",
            }
        )
        for role, column in scores.items():
            column.append(_score(f"{prefix}-{index}", role, response, given if on_policy else None, rng, scoring))
    rollouts = put(pa.RecordBatch.from_pylist(rows[::-1], schema=ROLLOUT_SCHEMA))
    scored = {
        role: put(pa.RecordBatch.from_pylist(column[::-1], schema=SCORE_SCHEMA)) for role, column in scores.items()
    }
    return [Entry(_meta(row, source), len(rows) - 1 - index, rollouts, scored) for index, row in enumerate(rows)]


def _score(
    rollout_id: str,
    role: str,
    response: np.ndarray,
    given: np.ndarray | None,
    rng: np.random.Generator,
    scoring: Scoring,
) -> dict[str, Any]:
    head = scoring.heads.get(role) or head_of(role, scoring.hidden_size)
    hidden = torch.from_numpy(rng.normal(size=(len(response), head.weight.shape[1]))).float()
    logprobs = head(hidden).double().log_softmax(-1)
    chosen = torch.from_numpy(response.astype(np.int64))
    stops = list(scoring.stop_token_ids)
    if len(stops) > 1:
        together = logprobs[:, stops].logsumexp(-1)
        logprobs[:, stops[1:]] = -torch.inf
        logprobs[:, stops[0]] = together
        chosen = torch.where(torch.isin(chosen, torch.tensor(stops)), stops[0], chosen)
    top = logprobs.topk(min(scoring.top_k, VOCABULARY), -1)
    asked = given is not None and given.shape[-1] > 0
    return {
        "rollout_id": rollout_id,
        "logprobs": logprobs.gather(-1, chosen[:, None]).squeeze(-1).numpy(),
        "topk_ids": top.indices.flatten().numpy(),
        "topk_logprobs": top.values.flatten().numpy(),
        "given_logprobs": logprobs.gather(-1, torch.from_numpy(given).long()).flatten().numpy() if asked else [],
        "stop_logprobs": logprobs[:, stops[0]].numpy() if stops else [],
        "hidden": hidden.flatten().numpy() if scoring.hidden else [],
    }


def _meta(row: dict[str, Any], source: Source) -> RolloutMeta:
    return RolloutMeta(
        rollout_id=row["rollout_id"],
        slot=row["slot"],
        prompt_id=row["prompt_id"],
        source=source,
        num_prompt_tokens=len(row["prompt_tokens"]),
        num_response_tokens=len(row["response_tokens"]),
        finish_reason=row["finish_reason"],
        correct=True,
        repetitive=False,
        oldest_version=0,
        mean_version=0.0,
        mean_behaviour_logprob=-3.5,
    )
