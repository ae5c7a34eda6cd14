"""What an evaluation says in numbers: of every set of problems, and of all of them together.

Of a set of n problems with k sampled answers each, c of them right:

    avg@k     mean over problems of c / k
    pass@j    mean over problems of 1 − C(k − c, j) / C(k, j), the unbiased estimate of the chance that at least one of
              j answers is right (Chen et al. 2021, arXiv 2107.03374, equation 1)
    error     √(Σ (x − x̄)² / (n (n − 1))), x being a problem's value: by how much the mean would scatter with other
              problems of the same kind and other samples

All sets together have the mean of the sets' values, however large each is, and the error √(Σ error²) / number of sets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opd_ray.config import HELD_OUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of 1 and log-probs in nats; all but accuracy_greedy are of the sampled answers."""

    accuracy_greedy: float | None
    """None where no answers at temperature 0 were asked for."""
    accuracy_sampled: float
    """avg@k."""
    accuracy_sampled_se: float | None = None
    """Its standard error; None for a single problem."""
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
    """The first teacher's view of the sampled answers, of names as in training (METHOD §2); None without one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetScores(Scores):
    """Of one set."""

    samples: int
    """k."""
    pass_at: dict[str, float]
    """j to pass@j, for j = 1, 2, 4, … and k."""
    pass_at_se: dict[str, float | None]
    """Their standard errors."""

    @property
    def curves(self) -> dict[str, float]:
        """What is worth a curve for every set."""
        names = ("accuracy_sampled", "accuracy_sampled_se", "accuracy_greedy", "truncation_rate", "mean_length")
        values = {name: getattr(self, name) for name in names}
        if self.samples > 1:
            values[f"pass_at_{self.samples}"] = self.pass_at[str(self.samples)]
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Scores):
    """Of all sets together: means over the sets that have a value, but for the number of problems, a sum."""

    sets: dict[str, SetScores] = dataclasses.field(default_factory=dict)
    verdicts: Mapping[str, pa.Table] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """By set, what the scores are made of (:mod:`opd_ray.evaluation.verdicts`); not saved with them."""

    @classmethod
    def over(cls, sets: Mapping[str, SetScores], verdicts: Mapping[str, pa.Table]) -> Evaluation:
        """The scores of at least one set."""
        each = list(sets.values())
        values = {
            field.name: _mean([getattr(scores, field.name) for scores in each])
            for field in dataclasses.fields(Scores)
            if field.name not in ("num_problems", "accuracy_sampled_se", "teacher")
        }
        views = [scores.teacher for scores in each if scores.teacher is not None]
        names = dict.fromkeys(name for view in views for name in view)
        return cls(
            **values,
            num_problems=sum(scores.num_problems for scores in each),
            accuracy_sampled_se=error_over_sets([scores.accuracy_sampled_se for scores in each]),
            teacher={name: _mean([view.get(name) for view in views]) for name in names} if views else None,
            sets=dict(sets),
            verdicts=verdicts,
        )

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Evaluation:
        """What ``saved`` gave; one of before there were sets has none."""
        sets = {name: SetScores(**scores) for name, scores in saved.get("sets", {}).items()}
        return cls(**{**saved, "sets": sets})

    def saved(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(dataclasses.replace(self, verdicts={}))
        del values["verdicts"]
        return values

    def metrics(self) -> dict[str, float]:
        """Under the names that metrics have; a set that was given no name has none besides those of all sets."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(Scores)}
        values = numbers | (self.teacher or {})
        del values["teacher"]
        for name, scores in self.sets.items():
            if name != HELD_OUT:
                values |= {f"{name}/{curve}": value for curve, value in scores.curves.items()}
        return {f"evaluation/{name}": float(value) for name, value in values.items() if value is not None}


def score(verdicts: pa.Table, teacher: dict[str, float] | None = None) -> SetScores:
    """Of a set's verdicts, which have the same number of sampled answers to every problem."""
    greedy = verdicts.filter(pc.is_null(verdicts["sample"]))
    sampled = verdicts.filter(pc.is_valid(verdicts["sample"]))
    right = list(right_by_problem(verdicts).values())
    samples = len(right[0])
    lengths, truncated = (sampled[name].to_numpy() for name in ("num_response_tokens", "truncated"))
    accuracy, error = mean_and_error([np.mean(answers) for answers in right])
    sizes = sorted({min(2**power, samples) for power in range(samples.bit_length() + 1)})
    passed = {str(j): mean_and_error([pass_at(int(np.sum(answers)), samples, j) for answers in right]) for j in sizes}
    return SetScores(
        accuracy_greedy=float(np.mean(greedy["correct"].to_numpy())) if len(greedy) else None,
        accuracy_sampled=accuracy,
        accuracy_sampled_se=error,
        truncation_rate=float(truncated.mean()),
        repetition_rate=float(sampled["repetitive"].to_numpy().mean()),
        mean_length=float(lengths.mean()),
        num_problems=len(right),
        length_p50=float(np.quantile(lengths, 0.5)),
        length_p95=float(np.quantile(lengths, 0.95)),
        truncated_token_share=float(lengths[truncated].sum() / lengths.sum()),
        student_logprob=float(np.average(sampled["mean_logprob"].to_numpy(), weights=lengths)),
        teacher=teacher,
        samples=samples,
        pass_at={j: mean for j, (mean, _) in passed.items()},
        pass_at_se={j: error for j, (_, error) in passed.items()},
    )


def right_by_problem(verdicts: pa.Table) -> dict[str, list[bool]]:
    """Id of a problem to whether each of its sampled answers is right."""
    found: dict[str, list[bool]] = {}
    for row in verdicts.select(["prompt_id", "sample", "correct"]).to_pylist():
        if row["sample"] is not None:
            found.setdefault(row["prompt_id"], []).append(row["correct"])
    return found


def pass_at(right: int, samples: int, j: int) -> float:
    """Of one problem; ``right`` of its ``samples`` answers are."""
    return 1 - math.comb(samples - right, j) / math.comb(samples, j)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over problems and its standard error; there is none for a single problem."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def error_over_sets(errors: Sequence[float | None]) -> float | None:
    """Of the mean over sets."""
    return None if None in errors else math.hypot(*errors) / len(errors)


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    """ "0.312 ± 0.061"; the value alone where there is no error."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
