"""Scorer: one frozen model that gives its log-probs of rollouts. Teacher and reference are two pools of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.engines import Rollout, Scores, ScoringEngine
from opd_ray.messages import SCORE_SCHEMA
from opd_ray.node import this_node


class Scorer:
    """Scores batches of rollouts; stateless between calls.

    ``eos_map`` (student id to this model's id) makes a model with another EOS token comparable: the student's
    EOS is scored as this model's, and the two ids trade places in the distribution.
    """

    def __init__(self, *, make_engine: Callable[[], ScoringEngine], eos_map: Mapping[int, int]) -> None:
        self._engine = make_engine()
        self._to_model = dict(eos_map)
        self._to_student = {theirs: ours for ours, theirs in eos_map.items()} | dict(eos_map)

    def node(self) -> str:
        return this_node()

    def score(self, rollouts: pa.RecordBatch, top_k: int) -> tuple[int, pa.RecordBatch]:
        """Returns the number of response tokens scored, and a row of SCORE_SCHEMA per rollout."""
        sequences = [
            Rollout(np.asarray(prompt.values), _swap(np.asarray(response.values), self._to_model))
            for prompt, response in zip(rollouts["prompt_tokens"], rollouts["response_tokens"], strict=True)
        ]
        scores = self._engine.score(sequences, top_k)
        return sum(len(each.logprobs) for each in scores), self._payload(rollouts["rollout_id"], scores)

    def _payload(self, rollout_ids: pa.Array, scores: list[Scores]) -> pa.RecordBatch:
        columns = [
            rollout_ids,
            _lists([each.logprobs for each in scores], pa.float32()),
            _lists([_swap(each.topk_ids.ravel(), self._to_student) for each in scores], pa.int32()),
            _lists([each.topk_logprobs.ravel() for each in scores], pa.float32()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCORE_SCHEMA)


def _swap(ids: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """``ids`` with every key of ``mapping`` replaced by its value."""
    if not mapping:
        return ids
    swapped = ids.copy()
    for old, new in mapping.items():
        swapped[ids == old] = new
    return swapped


def _lists(rows: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A list column from one array per row, without going through Python numbers."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    flat: Any = np.concatenate(rows) if rows else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))
