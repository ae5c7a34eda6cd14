"""Golden rollouts: given solutions in the form that rollouts have."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from opd_ray.data import read_prompts
from opd_ray.messages import ROLLOUT_SCHEMA, RolloutMeta
from opd_ray.tasks import Task


def load_golden(
    path: str, task: Task, tokenizer_path: str, eos_token_id: int
) -> tuple[list[RolloutMeta], pa.RecordBatch]:
    """Reads, tokenises and terminates every golden solution; a row per solution, in the file's order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = read_prompts(path, need_response=True)
    prompts = [task.format_prompt(row, tokenizer) for row in rows]
    responses = [[*tokenizer(row["response"], add_special_tokens=False)["input_ids"], eos_token_id] for row in rows]
    metas = [_meta(i, row, prompts[i], responses[i]) for i, row in enumerate(rows)]
    columns: dict[str, list[Any]] = {
        "rollout_id": [meta.rollout_id for meta in metas],
        "slot": [meta.slot for meta in metas],
        "prompt_id": [meta.prompt_id for meta in metas],
        "source": ["golden"] * len(rows),
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "behaviour_logprobs": [[] for _ in rows],
        "weight_versions": [[] for _ in rows],
        "finish_reason": ["stop"] * len(rows),
        "correct": [True] * len(rows),
        "text": [row["response"] for row in rows],
    }
    return metas, pa.RecordBatch.from_pydict(columns, schema=ROLLOUT_SCHEMA)


def _meta(index: int, row: dict[str, Any], prompt: list[int], response: list[int]) -> RolloutMeta:
    return RolloutMeta(
        rollout_id=f"golden-{index}",
        slot=-1,
        prompt_id=str(row["id"]),
        source="golden",
        num_prompt_tokens=len(prompt),
        num_response_tokens=len(response),
        finish_reason="stop",
        correct=True,
        repetitive=False,
        oldest_version=-1,
        newest_version=-1,
        mean_version=-1.0,
        mean_behaviour_logprob=float("nan"),
    )
