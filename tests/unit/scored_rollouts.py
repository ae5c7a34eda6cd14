"""Random rollouts with random scores, for tests of batching and of the learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.messages import ROLLOUT_SCHEMA, SCORE_SCHEMA, Entry, RolloutMeta

VOCABULARY = 32  # of conftest's tiny_model


def scored_entries(
    student: Sequence[tuple[int, int]],
    golden: Sequence[tuple[int, int]] = (),
    *,
    seed: int = 0,
    top_k: int = 8,
    put: Callable[[Any], Any] = lambda batch: batch,
) -> list[Entry]:
    """Entries of (prompt tokens, response tokens) pairs; ``put`` turns RecordBatches into refs.

    The student's are spread over two payloads in reverse order, so that rows and metas are out of step.
    """
    rng = np.random.default_rng(seed)
    half = len(student) // 2
    parts = [student[:half], student[half:]]
    entries = [
        entry for part, sizes in enumerate(parts) for entry in _payload(sizes, "student", f"s{part}", rng, top_k, put)
    ]
    return entries + _payload(golden, "golden", "g", rng, top_k, put)


def _payload(
    sizes: Sequence[tuple[int, int]],
    source: str,
    prefix: str,
    rng: np.random.Generator,
    top_k: int,
    put: Callable[[Any], Any],
) -> list[Entry]:
    if not sizes:
        return []
    on_policy = source == "student"
    rows: list[dict[str, Any]] = []
    scores: dict[str, list[dict[str, Any]]] = {"teacher": [], "reference": []} if on_policy else {}
    for index, (num_prompt, num_response) in enumerate(sizes):
        tokens = rng.integers(0, VOCABULARY, num_prompt + num_response).astype(np.int32)
        response = tokens[num_prompt:]
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
                "finish_reason": "stop",
                "correct": True,
                "text": "",
            }
        )
        for column in scores.values():
            column.append(_score(f"{prefix}-{index}", response, rng, top_k))
    rollouts = put(pa.RecordBatch.from_pylist(rows[::-1], schema=ROLLOUT_SCHEMA))
    scored = {
        role: put(pa.RecordBatch.from_pylist(column[::-1], schema=SCORE_SCHEMA)) for role, column in scores.items()
    }
    return [Entry(_meta(row, source), len(rows) - 1 - index, rollouts, scored) for index, row in enumerate(rows)]


def _score(rollout_id: str, response: np.ndarray, rng: np.random.Generator, top_k: int) -> dict[str, Any]:
    logprobs = torch.from_numpy(rng.normal(size=(len(response), VOCABULARY))).log_softmax(-1)
    top = logprobs.topk(min(top_k, VOCABULARY), -1)
    return {
        "rollout_id": rollout_id,
        "logprobs": logprobs.gather(-1, torch.from_numpy(response).long()[:, None]).squeeze(-1).numpy(),
        "topk_ids": top.indices.flatten().numpy(),
        "topk_logprobs": top.values.flatten().numpy(),
    }


def _meta(row: dict[str, Any], source: str) -> RolloutMeta:
    return RolloutMeta(
        rollout_id=row["rollout_id"],
        slot=row["slot"],
        prompt_id=row["prompt_id"],
        source=source,
        num_prompt_tokens=len(row["prompt_tokens"]),
        num_response_tokens=len(row["response_tokens"]),
        finish_reason="stop",
        correct=True,
        repetitive=False,
        oldest_version=0,
        newest_version=0,
        mean_version=0.0,
        mean_behaviour_logprob=-3.5,
    )
