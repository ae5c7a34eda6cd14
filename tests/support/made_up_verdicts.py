"""Verdicts on answers to held-out problems, made up, and evaluations that are made of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pyarrow as pa

from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation, score
from opd_ray.messages import PromptGroup
from small_messages import meta


def rows(
    right: Mapping[str, Sequence[bool]], greedy: Mapping[str, bool] | None = None, text: str = "the problem"
) -> pa.Table:
    """Id of a problem to whether each of its sampled answers is right, and whether the greedy one is."""
    answers = []
    for slot, (name, each) in enumerate(right.items()):
        group = PromptGroup(slot, name, (1,), {"prompt": f"{text} {name}", "answer": "a"}, len(each), 0)
        answers += [(group, i, meta(slot, correct=correct)) for i, correct in enumerate(each)]
        answers += [(group, None, meta(slot, correct=greedy[name]))] if greedy else []
    return verdicts.table(answers)


def drawn(seed: int, problems: int = 30, samples: int = 4) -> dict[str, list[bool]]:
    """Problems from impossible to easy."""
    rng = random.Random(seed)
    return {f"p{i}": [rng.random() < i / problems for _ in range(samples)] for i in range(problems)}


def evaluation(**sets: pa.Table) -> Evaluation:
    return Evaluation.over({name: score(table) for name, table in sets.items()}, sets)
