"""Asks the generators for answers to held-out problems, with the weights they hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa

from opd_ray.config import Config
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
    asked = {name: _Set(name, problems[name], config, most, stop_token_ids) for name in config.evaluation_sets}
    total, done = sum(each.num_answers for each in asked.values()), 0

    async def ask(groups: Sequence[PromptGroup], sampling: SamplingSettings, judged: bool) -> _Answers:
        nonlocal done
        metas, rollouts = await generators.call("generate", groups, sampling)
        done += len(metas)
        tell(done, total)
        if not (judged and judges):
            return metas, Counter()
        _, scores = await judges.teacher.call("score", rollouts, ScoreRequest(stop_token_ids=stop_token_ids))
        return metas, Counter(await judges.recorder.call("measure", rollouts, scores, payload=False))

    async def of_set(each: _Set) -> tuple[SetScores, pa.Table]:
        calls = [call for way in each.ways for call in way.calls(generators, config.rollout.max_num_seqs)]
        answers = await together(*(ask(groups, way.sampling, way.judged) for way, groups in calls))
        rows = verdicts.table(
            row for (way, groups), (metas, _) in zip(calls, answers, strict=True) for row in way.rows(groups, metas)
        )
        sums: Counter[str] = Counter()
        for _, part in answers:
            sums.update(part)
        return score(rows, teacher_view(sums) if sums else None), rows

    if not asked:
        return None
    found = dict(zip(asked, await together(*map(of_set, asked.values())), strict=True))
    return Evaluation.over(
        {name: scores for name, (scores, _) in found.items()}, {name: rows for name, (_, rows) in found.items()}
    )


_Answers = tuple[Sequence[RolloutMeta], Counter[str]]
"""Metas of one call, and the sums of what was measured on its rollouts; empty where nothing was."""


class _Set:
    """One set's problems, and the ways in which they are answered."""

    def __init__(
        self, name: str, problems: PromptStream, config: Config, most: int | None, stop_token_ids: tuple[int, ...]
    ) -> None:
        settings = config.evaluation_sets[name]
        limits = [limit for limit in (settings.num_problems, most) if limit is not None]
        once = [problems[slot] for slot in range(min([len(problems), *limits]))]
        often = [dataclasses.replace(group, num_responses=settings.samples) for group in once]
        sampled = SamplingSettings(settings.temperature, settings.top_p, settings.max_tokens, stop_token_ids)
        self.ways = [_Way(often, sampled)]
        if settings.greedy:
            self.ways.append(_Way(once, dataclasses.replace(sampled, temperature=0.0, top_p=1.0)))

    @property
    def num_answers(self) -> int:
        return sum(group.num_responses for way in self.ways for group in way.groups)


@dataclasses.dataclass(frozen=True)
class _Way:
    """Problems, and how they are sampled."""

    groups: Sequence[PromptGroup]
    sampling: SamplingSettings

    @property
    def judged(self) -> bool:
        """May a teacher's view of the answers be compared with the student's? At another temperature the student's is
        of another distribution."""
        return (self.sampling.temperature, self.sampling.top_p) == (1, 1)

    def calls(self, generators: Pool, most: int) -> list[tuple[_Way, Sequence[PromptGroup]]]:
        return [(self, groups) for groups in chunked(self.groups, generators, most)]

    def rows(
        self, groups: Sequence[PromptGroup], metas: Sequence[RolloutMeta]
    ) -> Iterator[tuple[PromptGroup, int | None, RolloutMeta]]:
        """What :func:`opd_ray.evaluation.verdicts.table` takes, of the answers to some groups."""
        owners = [(group, i) for group in groups for i in range(group.num_responses)]
        for (group, i), meta in zip(owners, metas, strict=True):
            yield group, i if self.sampling.temperature else None, meta


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
