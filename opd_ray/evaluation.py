"""Accuracy on held-out problems, answered by the generators with the weights they hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.data.prompts import PromptStream
from opd_ray.messages import PromptGroup, RolloutMeta, SamplingSettings, ScoreRequest
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.together import together


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Shares of 1 and log-probs in nats; all but accuracy_greedy are of the sampled answers."""

    accuracy_greedy: float
    accuracy_sampled: float
    truncation_rate: float
    repetition_rate: float
    mean_length: float
    """Response tokens, EOS included."""
    num_problems: int
    length_p50: float
    length_p95: float
    truncated_token_share: float
    student_logprob: float
    """Mean over tokens."""
    teacher: dict[str, float] | None = None
    """The first teacher's view of the sampled answers, of names as in training (METHOD §2); None without a teacher."""

    def metrics(self) -> dict[str, float]:
        """Under the names that metrics have."""
        values = dataclasses.asdict(self) | (self.teacher or {})
        del values["teacher"]
        return {f"evaluation/{name}": float(value) for name, value in values.items()}


async def evaluate(
    generators: Pool,
    problems: PromptStream,
    num_problems: int,
    config: Config,
    stop_token_ids: tuple[int, ...],
    *,
    teacher: Pool | None = None,
    recorder: Pool | None = None,
) -> Evaluation:
    """One greedy and one sampled answer to each of the first ``num_problems`` problems.

    Where there is a ``teacher``, the sampled answers are also measured as training rollouts are, by ``recorder``.
    """
    groups = [problems[i] for i in range(num_problems)]
    sampled = SamplingSettings(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_response_tokens=config.rollout.longest_response,
        stop_token_ids=stop_token_ids,
    )

    async def answers_of(sampling: SamplingSettings) -> list[tuple[Sequence[RolloutMeta], Any]]:
        chunks = chunked(groups, generators, config.rollout.max_num_seqs)
        return await together(*(generators.call("generate", chunk, sampling) for chunk in chunks))

    greedy = dataclasses.replace(sampled, temperature=0.0)
    greedy_answers, answers = await together(answers_of(greedy), answers_of(sampled))
    metas = [meta for chunk, _ in answers for meta in chunk]
    lengths = np.array([meta.num_response_tokens for meta in metas])
    truncated = np.array([meta.truncated for meta in metas])
    return Evaluation(
        accuracy_greedy=float(np.mean([meta.correct for chunk, _ in greedy_answers for meta in chunk])),
        accuracy_sampled=float(np.mean([meta.correct for meta in metas])),
        truncation_rate=float(truncated.mean()),
        repetition_rate=float(np.mean([meta.repetitive for meta in metas])),
        mean_length=float(lengths.mean()),
        num_problems=num_problems,
        length_p50=float(np.quantile(lengths, 0.5)),
        length_p95=float(np.quantile(lengths, 0.95)),
        truncated_token_share=float(lengths[truncated].sum() / lengths.sum()),
        student_logprob=float(np.average([meta.mean_behaviour_logprob for meta in metas], weights=lengths)),
        teacher=await _ask_teacher(teacher, recorder, answers, stop_token_ids) if teacher and recorder else None,
    )


def chunked(groups: Sequence[PromptGroup], generators: Pool, most: int) -> list[Sequence[PromptGroup]]:
    """The groups in order, in one call for each generator that is ready, or in more where a call would be of more than
    ``most``: an engine that is handed as many as it can hold leaves the others idle."""
    size = min(most, -(-len(groups) // max(1, len(generators.those("ready")))))
    return [groups[i : i + size] for i in range(0, len(groups), size)]


async def _ask_teacher(
    teacher: Pool, recorder: Pool, answers: Sequence[tuple[Sequence[RolloutMeta], Any]], stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """What the first teacher thinks of the sampled answers; they stay in the object store."""
    request = ScoreRequest(stop_token_ids=stop_token_ids)

    async def measure(rollouts: Any) -> dict[str, float]:
        _, scores = await teacher.call("score", rollouts, request)
        return await recorder.call("measure", rollouts, scores, payload=False)

    sums: Counter[str] = Counter()
    for part in await together(*(measure(rollouts) for _, rollouts in answers)):
        sums.update(part)
    return teacher_view(sums)


def teacher_view(sums: Mapping[str, float]) -> dict[str, float]:
    """Means out of the sums of :meth:`opd_ray.watch.recorder.Recorder.measure`; a mean over nothing is left out."""
    repetitive, tokens = sums["repetitive_tokens"], sums["tokens"]
    pairs = {
        "teacher_logprob": (sums["teacher_logprob"], tokens),
        "advantage": (sums["advantage"], tokens),
        "advantage_repetitive": (sums["advantage_repetitive"], repetitive),
        "advantage_other": (sums["advantage"] - sums["advantage_repetitive"], tokens - repetitive),
        "repetitive_share": (repetitive, tokens),
        "eos_teacher_end": (sums["eos_teacher_end"], sums["ends"]),
        "eos_teacher_cut": (sums["eos_teacher_cut"], sums["cuts"]),
    }
    return {name: float(total / count) for name, (total, count) in pairs.items() if count}
