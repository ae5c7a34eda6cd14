"""Asks the generators for answers to held-out problems, with the weights they hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from opd_ray.config import Config, EvaluationSet
from opd_ray.data.prompts import PromptStream
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation, SetScores, score
from opd_ray.messages import PromptGroup, RolloutMeta, SamplingSettings, ScoreRequest
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.together import together


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who else looks at sampled answers: what the ``teacher`` scores, the ``recorder`` measures."""

    teacher: Pool
    recorder: Pool


async def evaluate(
    generators: Pool,
    problems: Mapping[str, PromptStream],
    config: Config,
    stop_token_ids: tuple[int, ...],
    *,
    most: int | None = None,
    judges: Judges | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation | None:
    """Every set of the configuration, all at once, so that no generator idles while one set's last answers are written.

    ``most``: of each set no more than the first so many problems. The sampled answers of sets whose policy is the
    student's own distribution (temperature 1, top_p 1) are also measured as training rollouts are, by ``judges``.
    ``tell`` hears how many answers there are of how many, after every call. None where nothing is evaluated.
    """
    common = SamplingSettings(1.0, 1.0, 0, stop_token_ids, repetition_rule=config.rollout.repetition_rule)
    sets = {name: _ways(each, problems[name], most, common) for name, each in config.evaluation_sets.items()}
    if not sets:
        return None
    total = sum(group.num_responses for ways in sets.values() for way in ways for group in way.groups)
    asking = _Asking(generators, judges, config.rollout.max_num_seqs, lambda done: tell(done, total))
    found = dict(zip(sets, await together(*map(asking.scores, sets.values())), strict=True))
    return Evaluation.over(
        {name: scores for name, (scores, _) in found.items()}, {name: rows for name, (_, rows) in found.items()}
    )


@dataclasses.dataclass(frozen=True)
class _Way:
    """Problems of a set, and how they are answered."""

    groups: Sequence[PromptGroup]
    sampling: SamplingSettings
    judged: bool
    """Are the answers looked at by the teacher?"""


def _ways(settings: EvaluationSet, problems: PromptStream, most: int | None, common: SamplingSettings) -> list[_Way]:
    """How a set is answered: sampled, and greedily where that is asked for. ``common`` is what all sets share."""
    limits = [limit for limit in (settings.num_problems, most) if limit is not None]
    once = [problems[slot] for slot in range(min([len(problems), *limits]))]
    often = [dataclasses.replace(group, num_responses=settings.samples) for group in once]
    sampled = dataclasses.replace(
        common, temperature=settings.temperature, top_p=settings.top_p, max_response_tokens=settings.max_tokens
    )
    greedy = dataclasses.replace(sampled, temperature=0.0, top_p=1.0)
    return [_Way(often, sampled, settings.sampled_plainly), *([_Way(once, greedy, False)] if settings.greedy else [])]


class _Asking:
    """The calls of one evaluation."""

    def __init__(
        self, generators: Pool, judges: Judges | None, most_responses: int, tell: Callable[[int], None]
    ) -> None:
        """``most_responses`` of one call; ``tell`` hears how many answers there are."""
        self._generators, self._judges, self._most, self._tell = generators, judges, most_responses, tell
        self._done = 0

    async def scores(self, ways: Sequence[_Way]) -> tuple[SetScores, pa.Table]:
        """Of one set, with the verdicts that they are made of."""
        calls = [(way, groups) for way in ways for groups in chunked(way.groups, self._generators, self._most)]
        answers = await together(*(self._ask(way, groups) for way, groups in calls))
        rows, sums = [], Counter()
        for (way, groups), (metas, measured) in zip(calls, answers, strict=True):
            owners = [(group, i) for group in groups for i in range(group.num_responses)]
            rows += [
                (group, i if way.sampling.temperature else None, meta)
                for (group, i), meta in zip(owners, metas, strict=True)
            ]
            sums.update(measured)
        kept = verdicts.table(rows)
        return score(kept, teacher_view(sums) if sums else None), kept

    async def _ask(self, way: _Way, groups: Sequence[PromptGroup]) -> tuple[Sequence[RolloutMeta], Mapping[str, float]]:
        """Metas of the answers, and sums of what was measured on them; empty where nothing was."""
        metas, rollouts = await self._generators.call("generate", groups, way.sampling)
        self._done += len(metas)
        self._tell(self._done)
        if self._judges is None or not way.judged:
            return metas, {}
        request = ScoreRequest(stop_token_ids=way.sampling.stop_token_ids)
        _, scores = await self._judges.teacher.call("score", rollouts, request)
        return metas, await self._judges.recorder.call("measure", rollouts, scores, payload=False)


def chunked(groups: Sequence[PromptGroup], generators: Pool, most: int) -> list[Sequence[PromptGroup]]:
    """The groups in order, in one call for each generator that is ready, or in more where a call would be of more than
    ``most`` responses: an engine that is handed as many as it can hold leaves the others idle."""
    if not groups:
        return []
    engine_holds = max(1, most // groups[0].num_responses)
    size = min(engine_holds, -(-len(groups) // max(1, len(generators.those("ready")))))
    return [groups[i : i + size] for i in range(0, len(groups), size)]


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
