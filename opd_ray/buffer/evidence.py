"""What each prompt is taught by, where verdicts decide it: the teacher, its golden solution, or the reward.

Reverse KL seeks modes: a teacher that is surely wrong on a prompt moves the student more than one that hesitates, and
neither its entropy nor its agreement with the student tells (TGOPD, "Verify Before You Distill", arXiv 2609.02998). So
the task's verifier is asked. Of a prompt with n_T verdicts on the teacher's responses, k_T of them right, and n_S and
k_S on the student's,

    teacher   where L(k_T, n_T) ≥ threshold and not L(k_S, n_S) > U(k_T, n_T):    w D(π_θ, π_T) with w = 1
    golden    else, where the step has a golden solution to it:                    cross-entropy on it, w = 1 + c below
    reward    else, where loss.advantage.reward_coef = α > 0 and the verdicts on the student's responses of the step
              differ:    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),    A = α (r − mean r), over std r with reward_std
    nothing   else

L and U are the one-sided bounds of Wilson (1927), of a share p = k/n with z standard errors (``confidence``)

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)      0 and 1 where n is 0

so that one lucky response is no evidence: at .9, 3 right of 3 show a share of .65, 1 of 1 one of .38. Verdicts that
were given up count on neither side. TGOPD takes the share itself: q_T = k_T/K_T of K_T = 3 probes at every visit, the
teacher where q_T ≥ τ = 2/3, else the reward, A = r − mean r (its equations 2, 5 and 6): here confidence .5, threshold
.66, reward_std false, without golden solutions. Golden solutions, bounds, the comparison with the student and what is
kept between visits are ours. The paper itself could not be had: its formulas are those of a summary of it, which leave
open how β of its OPD advantage was chosen.

The teacher is frozen, so that its verdicts keep their weight and no prompt is probed again; those on the student lose
half of theirs in ``half_life_steps``, for it changes. Probes are asked for while the student samples: ``probes`` a
prompt and, where the bounds lie on both sides of the threshold, as many again, once. A visit costs 2 · probes at most.

All rollouts of the student stay in the step with the KL to the reference on their states, and in what means divide by:
a prompt weighs the same whatever it is taught by. A golden solution in the student's place counts for itself, as any
other, and as those rollouts would have: c = coef_student / coef_golden · (golden rollouts of the step / its prompts),
of a sum instead of a mean coef_student / coef_golden · (the student's rollouts / its prompts).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from opd_ray.config import Config
from opd_ray.messages import TAUGHT_BY, Coefficients, Entry, RolloutMeta, Source, TaughtBy

_CLASSES = 6
"""Of lengths, that a map has at most."""


class Verdicts(NamedTuple):
    """So many responses right of those that were judged; of the student's neither need be whole numbers."""

    right: float = 0.0
    judged: float = 0.0

    def lower(self, z: float) -> float:
        return self._bound(-z) if self.judged else 0.0

    def upper(self, z: float) -> float:
        return self._bound(z) if self.judged else 1.0

    def _bound(self, z: float) -> float:
        share, n = self.right / self.judged, self.judged
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return (share + z * z / (2 * n) + half) / (1 + z * z / n)

    def add(self, metas: Collection[RolloutMeta]) -> Verdicts:
        """With those on some more responses; what was given up, or cut off before its budget, has none."""
        known = [meta.correct for meta in metas if meta.whole and not meta.no_verdict]
        return Verdicts(self.right + sum(known), self.judged + len(known))


@dataclass(frozen=True)
class Known:
    """Of one prompt, after its last visit."""

    teacher: Verdicts = Verdicts()
    student: Verdicts = Verdicts()
    step: int = 0
    """The 0-based one that visited it."""
    prompt_tokens: int = 0
    taught_by: TaughtBy = "nothing"

    @classmethod
    def of(cls, row: Sequence[Any]) -> Known:
        teacher, student, *more = row
        return cls(Verdicts(*teacher), Verdicts(*student), *more)

    def row(self) -> list[Any]:
        """Plain values; :meth:`of` reads them."""
        student = [round(each, 6) for each in self.student]
        return [[*self.teacher], student, self.step, self.prompt_tokens, self.taught_by]

    def at(self, step: int, half_life_steps: float) -> Known:
        """What of it is left at a later step."""
        kept = 0.5 ** (max(0, step - self.step) / half_life_steps)
        return replace(self, student=Verdicts(self.student.right * kept, self.student.judged * kept), step=step)


class Evidence:
    """Verdicts by prompt, over a run."""

    def __init__(self, config: Config, state: Mapping[str, Any] | None = None) -> None:
        """``state``: what :meth:`state` gave, to go on from there."""
        self._config, self._settings = config, config.buffer.evidence
        self._rows: dict[str, list[Any]] = dict(state or {})
        """By prompt as they are saved, and never changed: snapshots are taken after every step."""

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint: some 60 bytes a prompt."""
        return dict(self._rows)

    def _known(self, prompt_id: str) -> Known:
        return Known.of(self._rows[prompt_id]) if prompt_id in self._rows else Known()

    def probes(self, prompt_id: str, seen: Collection[RolloutMeta] = ()) -> int:
        """Responses of the teacher that are yet to be judged, with those that this visit has ``seen``."""
        of, settings = self._known(prompt_id).teacher.add(seen), self._settings
        if of.judged < settings.probes:
            return settings.probes - int(of.judged)
        is_open = of.lower(settings.z) < settings.threshold <= of.upper(settings.z)
        return max(0, 2 * settings.probes - int(of.judged)) if is_open else 0

    def teach(self, step: int, entries: Sequence[Entry], coefficients: Coefficients) -> list[Entry]:
        """The entries of a 0-based step with what each is taught by, and its weight."""
        found = self._of(step, entries, golden=coefficients.golden > 0)
        chosen: dict[str, TaughtBy] = {prompt_id: each.taught_by for prompt_id, each in found.items()}

        def taught_by(entry: Entry) -> TaughtBy | None:
            own = chosen.get(entry.meta.prompt_id)
            if entry.meta.source == "student":
                return "nothing" if own == "reward" and entry.meta.no_verdict else own
            return entry.taught_by if entry.meta.source == "teacher" else "golden" if own == "golden" else None

        return weighed([replace(entry, taught_by=taught_by(entry)) for entry in entries], coefficients, self._config)

    def learn(self, step: int, entries: Sequence[Entry]) -> dict[str, float]:
        """Takes in what a step trained on, as :meth:`teach` gave it; metrics of the step."""
        chosen: dict[str, TaughtBy] = {}
        for each in entries:
            if each.meta.source == "student" and (each.taught_by != "nothing" or each.meta.prompt_id not in chosen):
                chosen[each.meta.prompt_id] = each.taught_by or "nothing"
        found = self._of(step, entries, golden=True)
        new = {prompt_id: replace(known, taught_by=chosen[prompt_id]) for prompt_id, known in found.items()}
        self._rows |= {prompt_id: each.row() for prompt_id, each in new.items()}
        counts, number = Counter(each.taught_by for each in new.values()), max(1, len(new))
        metrics = {f"taught_by_{each}_share": counts[each] / number for each in TAUGHT_BY}
        trusted = [each.teacher for each in new.values() if each.teacher.judged]
        if trusted:
            metrics["teacher_right_share"] = sum(each.right / each.judged for each in trusted) / len(trusted)
        return metrics

    def _of(self, step: int, entries: Sequence[Entry], *, golden: bool) -> dict[str, Known]:
        """The student's prompts of a step with their verdicts, this visit's included, and what they are taught by."""
        metas: dict[tuple[Source, str], list[RolloutMeta]] = defaultdict(list)
        for entry in entries:
            metas[entry.meta.source, entry.meta.prompt_id].append(entry.meta)
        half_life, found = self._settings.half_life_steps, {}
        for (source, prompt_id), own in metas.items():
            if source != "student":
                continue
            known = self._known(prompt_id).at(step, half_life)
            teacher = known.teacher.add(metas.get(("teacher", prompt_id), ()))
            student = known.student.add(own)
            solved = golden and ("golden", prompt_id) in metas
            choice = self._choose(teacher, student, own, solved=solved)
            found[prompt_id] = Known(teacher, student, step, own[0].num_prompt_tokens, choice)
        return found

    def _choose(self, teacher: Verdicts, student: Verdicts, group: Sequence[RolloutMeta], *, solved: bool) -> TaughtBy:
        z = self._settings.z
        if teacher.judged and teacher.lower(z) >= self._settings.threshold and student.lower(z) <= teacher.upper(z):
            return "teacher"
        if solved:
            return "golden"
        verdicts = {meta.correct for meta in group if not meta.no_verdict}
        return "reward" if self._config.loss.advantage.reward_coef > 0 and len(verdicts) > 1 else "nothing"

    def map(self) -> dict[str, Any]:
        """Where the teacher can be trusted, for summary.json: of all prompts that were visited, how many are taught by
        what (``taught_by``), by fifths of the teacher's and the student's shares of right responses (``shares``: those
        two, then the counts) and by the prompt's tokens (``lengths``: fewest, most, right and judged of the teacher, of
        the student, then the counts). Fifths are 0 to 4, null without a verdict."""
        every = [Known.of(row) for row in self._rows.values()]
        shares: dict[tuple[int | None, int | None], Counter[str]] = defaultdict(Counter)
        for each in every:
            shares[_fifth(each.teacher), _fifth(each.student)][each.taught_by] += 1
        return {
            "prompts": len(every),
            "taught_by": _counted(Counter(each.taught_by for each in every)),
            "shares": [[*place, _counted(counts)] for place, counts in shares.items()],
            "lengths": [_class(part) for part in _by_length(every)],
        }


def weighed(entries: Sequence[Entry], coefficients: Coefficients, config: Config) -> list[Entry]:
    """The entries with the weights that follow from what they are taught by."""
    counts = Counter(entry.meta.source for entry in entries)
    prompts = max(1, len({entry.meta.slot for entry in entries if entry.meta.source == "student"}))
    per_prompt = counts["student"] if config.loss.reduction == "sum" else counts["golden"]
    instead = coefficients.student / coefficients.golden * per_prompt / prompts if coefficients.golden else 0.0

    def weight(entry: Entry) -> float:
        if entry.meta.source == "golden":
            return 1.0 + instead * (entry.taught_by == "golden")
        return float(entry.meta.source != "student" or entry.taught_by in (None, "teacher"))

    return [replace(entry, weight=weight(entry)) for entry in entries]


def _by_length(every: Sequence[Known]) -> list[list[Known]]:
    """Prompts of a few classes, each of as many if lengths allow, none with a length that another has too."""
    by_tokens: dict[int, list[Known]] = defaultdict(list)
    for each in every:
        by_tokens[each.prompt_tokens].append(each)
    classes: list[list[Known]] = []
    for _, same in sorted(by_tokens.items()):
        if classes and len(by_tokens) > _CLASSES and len(classes[-1]) < len(every) / _CLASSES:
            classes[-1] += same
        else:
            classes.append(same)
    return classes


def _fifth(verdicts: Verdicts) -> int | None:
    return min(4, int(5 * verdicts.right / verdicts.judged)) if verdicts.judged else None


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {each: counts[each] for each in TAUGHT_BY if counts.get(each)}


def _class(part: Sequence[Known]) -> list[Any]:
    tokens = [each.prompt_tokens for each in part]
    sums = [
        round(sum(getattr(getattr(each, who), of) for each in part), 3)
        for who in ("teacher", "student")
        for of in ("right", "judged")
    ]
    return [min(tokens), max(tokens), *sums, _counted(Counter(each.taught_by for each in part))]
