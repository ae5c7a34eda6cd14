"""One step of the objective on a small model, without a learner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd_ray.buffer.plan import count, plan_step
from opd_ray.config import Config, from_dict
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.losses.diagnostics import finish
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.learn.objective import Objective
from opd_ray.messages import Coefficients, Entry, StepPlan
from opd_ray.models.heads import FrozenHead
from scored_rollouts import head_of

COEFFICIENTS = Coefficients(student=0.7, golden=0.4, teacher=0.2, reference=0.3)


@dataclass(frozen=True)
class Step:
    """What a step came to."""

    loss: float
    gradients: list[torch.Tensor]
    """Of every parameter."""
    sums: dict[str, float]
    """Metrics as ranks add them up."""
    problems: list[str]

    @property
    def metrics(self) -> dict[str, float]:
        return finish(self.sums)


def config_with(loss: Mapping[str, Any] = {}, **sections: Any) -> Config:
    """The default configuration with teacher rollouts mixed in and loops that end, and changes."""
    loops = {"min_pattern_size": 1, "max_pattern_size": 4, "min_count": 4}
    base = {
        "buffer": {"teacher_per_prompt": 0.5},
        "rollout": {"responses_per_prompt": 2, "repetition_detection": loops},
    }
    return from_dict(base | sections | {"loss": {"teacher": {"coef": 0.2}} | dict(loss)})


def whole(entries: Sequence[Entry], coefficients: Coefficients = COEFFICIENTS) -> StepPlan:
    """All in one micro-batch on one rank."""
    return StepPlan(0, (tuple(entries),), count(entries), coefficients)


def cut(
    entries: Sequence[Entry], num_ranks: int, budget: int, packing: bool, coefficients: Coefficients = COEFFICIENTS
) -> list[StepPlan]:
    """Over ranks and micro-batches."""
    return plan_step(
        entries, step=0, num_ranks=num_ranks, micro_batch_tokens=budget, packing=packing, coefficients=coefficients
    )


def take(
    module: ResponseModel,
    plans: Sequence[StepPlan],
    config: Config,
    *,
    packing: bool = False,
    chunk_rows: int | None = None,
    stop_token_ids: tuple[int, ...] = (1,),
    heads: Mapping[str, FrozenHead] | None = None,
) -> Step:
    """Loss, gradient and metrics of one step, summed over ranks and micro-batches."""
    module.zero_grad()
    if heads is None:
        heads = {role: head_of(role) for role in (*config.teachers, "reference")}
    objective = Objective(config, vocab_size=module.vocab_size, stop_token_ids=stop_token_ids, heads=heads)
    objective.chunk_rows = chunk_rows or objective.chunk_rows
    sums: Counter[str] = Counter()
    problems = []
    for plan in plans:
        payloads, _ = fetch_payloads(plan, lambda refs: refs)
        for entries in plan.micro_batches:
            batch = collate(entries, payloads, packing=packing, loops=config.told_loops)
            loss = objective.of(batch, plan.denominators, plan.coefficients)
            module.consume(loss)
            module(batch.input_ids, batch.position_ids, batch.logit_index).backward()
            sums.update(loss.metrics)
            problems += [loss.problem] if loss.problem else []
    return Step(sums["loss"], [parameter.grad.clone() for parameter in module.parameters()], sums, problems)
