"""What a learner needs around its steps that knows nothing of DeepSpeed or ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from opd_ray.batching import Payload
from opd_ray.config import LearnerConfig
from opd_ray.messages import Entry, StepPlan


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to; the same on every rank."""

    metrics: dict[str, float]
    """Means over all ranks' tokens, nats."""
    problem: str | None = None
    """Why the step was not taken: a loss or gradient that is not finite. Weights, optimizer and learning rate are
    then as before, and the metric ``loss`` is nan."""
    lost: tuple[str, ...] = ()
    """Rollouts whose payloads are gone from the object store, on any rank. Nothing was computed; there are no metrics
    and everything is as before."""


def fetch_payloads(plan: StepPlan, fetch: Callable[[list[Any]], list[Any]]) -> dict[int, Payload]:
    """Every distinct payload of a plan, fetched at once; keyed by ``id(ref)``."""
    refs = {id(ref): ref for entry in _entries(plan) for ref in _refs(entry)}
    return dict(zip(refs, map(Payload, fetch(list(refs.values()))), strict=True))


def lost_rollouts(plan: StepPlan, fetch: Callable[[list[Any]], list[Any]]) -> tuple[str, ...]:
    """Ids of the rollouts of a plan that have a payload which is gone; fetches the payloads one by one."""
    gone: set[int] = set()
    for ref in {id(ref): ref for entry in _entries(plan) for ref in _refs(entry)}.values():
        try:
            fetch([ref])
        except Exception as error:
            if not is_loss(error):
                raise
            gone.add(id(ref))
    return tuple(entry.meta.rollout_id for entry in _entries(plan) if any(id(ref) in gone for ref in _refs(entry)))


def is_loss(error: BaseException | None) -> bool:
    """Does an error of ``ray.get`` say that the object is gone, or that the one it was made from is?"""
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

    if isinstance(error, RayTaskError) and not isinstance(error, ObjectLostError):
        return isinstance(error.cause, BaseException) and is_loss(error.cause)
    return isinstance(error, ObjectLostError | RayActorError | WorkerCrashedError | NodeDiedError)


def _entries(plan: StepPlan) -> Iterator[Entry]:
    return (entry for micro_batch in plan.micro_batches for entry in micro_batch)


def _refs(entry: Entry) -> tuple[Any, ...]:
    return (entry.rollouts, *entry.scores.values())


def lr_factor(config: LearnerConfig, step: int) -> float:
    """Share of the peak learning rate at a 0-based step.

    It rises linearly to 1 over the warm-up; "linear" and "cosine" then fall and would reach 0 at
    ``config.steps``, the first step that is not taken.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return 1.0 - done if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def disable_dropout(model: torch.nn.Module) -> None:
    """π_θ is the policy that generates, which has no dropout; a checkpoint's own rate would bias A and ρ."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
