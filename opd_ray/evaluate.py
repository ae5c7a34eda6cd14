"""Accuracy on held-out problems, answered by the generators with the weights they hold."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_ray.config import Config
from opd_ray.messages import PromptGroup, RolloutMeta, SamplingSettings
from opd_ray.pool import Pool
from opd_ray.prompts import PromptStream


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Shares of 1; all but accuracy_greedy are of the sampled answers."""

    accuracy_greedy: float
    accuracy_sampled: float
    truncation_rate: float
    repetition_rate: float
    mean_length: float
    """Response tokens, EOS included."""
    num_problems: int


async def evaluate(
    generators: Pool, problems: PromptStream, num_problems: int, config: Config, stop_token_ids: tuple[int, ...]
) -> Evaluation:
    """One greedy and one sampled answer to each of the first ``num_problems`` problems."""
    groups = [problems[i] for i in range(num_problems)]
    sampled = SamplingSettings(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_response_tokens=config.rollout.max_response_tokens,
        stop_token_ids=stop_token_ids,
    )
    greedy = dataclasses.replace(sampled, temperature=0.0)
    greedy_metas, metas = await asyncio.gather(
        _answer(generators, groups, greedy, config), _answer(generators, groups, sampled, config)
    )
    return Evaluation(
        accuracy_greedy=float(np.mean([meta.correct for meta in greedy_metas])),
        accuracy_sampled=float(np.mean([meta.correct for meta in metas])),
        truncation_rate=float(np.mean([meta.truncated for meta in metas])),
        repetition_rate=float(np.mean([meta.repetitive for meta in metas])),
        mean_length=float(np.mean([meta.num_response_tokens for meta in metas])),
        num_problems=num_problems,
    )


async def _answer(
    generators: Pool, groups: Sequence[PromptGroup], sampling: SamplingSettings, config: Config
) -> list[RolloutMeta]:
    size = config.rollout.max_num_seqs
    chunks = [groups[i : i + size] for i in range(0, len(groups), size)]
    answers = await asyncio.gather(*(generators.call("generate", chunk, sampling) for chunk in chunks))
    return [meta for metas, _ in answers for meta in metas]
