"""Loss and gradient of a step's rollouts under a configuration, token by token."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch

from opd_ray.buffer.evidence import weighed
from opd_ray.buffer.plan import group_advantages, plan_step
from opd_ray.config import Config, ScorerConfig
from opd_ray.errors import InputError, RunError
from opd_ray.learn.losses import TokenBatch
from opd_ray.learn.losses.advantage import combined_logprobs
from opd_ray.learn.losses.diagnostics import finish
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.learn.objective import Objective, WeightedSegment
from opd_ray.learn.reference import OwnReference
from opd_ray.messages import Coefficients, Entry, ScoreRequest, StepPlan
from opd_ray.models.heads import load_heads
from opd_ray.replay.student import Student
from opd_ray.score.requests import roles_of, score_requests
from opd_ray.score.scorer import Scorer
from opd_ray.score.torch import TorchScoringEngine
from opd_ray.score.translation import Translation

SIGNALS = ("loss", "push", "size", "advantage")
"""What is known of each token, in units of the mean token of its source (times the number of its source's tokens): its
share of the loss; −∂L/∂z of its own logit, which a step raises by it; ‖∂L/∂z‖ of all logits; and the advantage in nats:
that of the policy gradient, else log π_T − log π_θ (nan without a teacher)."""


@dataclass(frozen=True)
class Replayed:
    """A step under one configuration."""

    metrics: dict[str, float]
    """As a run logs them, ``loss`` and ``grad_norm`` among them."""
    tokens: dict[str, np.ndarray]
    """Rollout id to [response tokens, SIGNALS] float32; nan behind its horizon, where nothing is trained on."""


class Scorers:
    """Teachers and reference, which are loaded when they are first asked and keep what they said of the last step."""

    def __init__(self, translations: Mapping[str, Translation] = MappingProxyType({})) -> None:
        """``translations``: how teachers with another tokenizer are asked, by role."""
        self._translations = translations
        self._there: dict[tuple[str, str], Scorer] = {}
        self._said: dict[tuple[str, str, ScoreRequest, tuple[str, ...]], pa.RecordBatch] = {}

    def score(self, config: Config, entries: Sequence[Entry], stop_token_ids: tuple[int, ...]) -> list[Entry]:
        """The entries with the scores that their loss compares with."""
        requests = score_requests(config, stop_token_ids)
        scored: dict[int, Entry] = {}
        groups = sorted({(entry.meta.source, entry.meta.teacher) for entry in entries})
        own_ids = {entry.meta.rollout_id for entry in entries}
        self._said = {key: said for key, said in self._said.items() if own_ids.issuperset(key[-1])}
        for source, teacher in groups:
            own = [
                (at, entry)
                for at, entry in enumerate(entries)
                if (entry.meta.source, entry.meta.teacher) == (source, teacher)
            ]
            rollouts = own[0][1].rollouts.take(pa.array([entry.row for _, entry in own]))
            asked = roles_of(config, requests.get(source, {}), teacher)
            scores = {role: self._score(config, role, rollouts, request) for role, request in asked.items()}
            for row, (at, entry) in enumerate(own):
                scored[at] = replace(entry, row=row, rollouts=rollouts, scores=scores)
        return [scored[at] for at in range(len(entries))]

    def _score(self, config: Config, role: str, rollouts: pa.RecordBatch, request: ScoreRequest) -> pa.RecordBatch:
        scorer = config.scorers[role]
        key = role, scorer.path, request, tuple(rollouts["rollout_id"].to_pylist())
        if key not in self._said:
            try:
                _, self._said[key] = asyncio.run(self._asked(role, scorer).score(rollouts, request))
            except RunError as error:
                raise InputError(f"replay: {role}: {error}") from None
        return self._said[key]

    def _asked(self, role: str, scorer: ScorerConfig) -> Scorer:
        if (role, scorer.path) not in self._there:

            def make() -> TorchScoringEngine:
                return TorchScoringEngine(
                    path=scorer.path, dtype=scorer.dtype, max_batch_tokens=scorer.max_batch_tokens
                )

            there = self._there[role, scorer.path] = Scorer(make_engine=make, scorer=scorer, member=False)
            asyncio.run(there.begin(scorer, self._translations.get(role)))
        return self._there[role, scorer.path]


class Step:
    """What a configuration makes of the student's steps."""

    def __init__(self, config: Config, student: Student, scorers: Scorers, stop_token_ids: tuple[int, ...]) -> None:
        self._config, self._student, self._scorers, self._stops = config, student, scorers, stop_token_ids
        self._objective = Objective(
            config,
            vocab_size=student.module.vocab_size,
            stop_token_ids=stop_token_ids,
            heads=load_heads(config, str(student.path), student.device),
        )
        self._reference = None
        if config.uses_reference and config.learner_is_reference:
            self._reference = OwnReference(student.module, student.adapters, self._objective)

    def measure(self, step: int, entries: Sequence[Entry], coefficients: Coefficients) -> Replayed:
        """The step that makes the weights of version ``step``. Its gradient stays in the student."""
        for parameter in self._student.parameters.values():
            parameter.grad = None
        watch = _Watch()
        self._objective.watch = watch
        sums = self.backward(step, entries, coefficients)
        self._objective.watch = None
        gradients = [each.grad for each in self._student.parameters.values() if each.grad is not None]
        metrics = finish(sums) | {"grad_norm": float(torch.nn.utils.get_total_norm(gradients))}
        return Replayed(metrics, watch.tokens(entries))

    def backward(self, step: int, entries: Sequence[Entry], coefficients: Coefficients) -> Mapping[str, float]:
        """Adds the step's gradient to the student's; the sums of what is logged. InputError where scores are missing.

        Cut into the micro-batches that the run's ranks had.
        """
        config = self._config
        if config.buffer.evidence:  # what was decided then
            entries = weighed(entries, coefficients, config)
        else:
            entries = [replace(entry, taught_by=None) for entry in entries]
        scored = self._scorers.score(config, entries, self._stops)
        if config.loss.advantage.reward_coef > 0:
            scored = group_advantages(scored, config.loss.advantage.reward_std)
        plans = plan_step(
            scored,
            step=step - 1,
            coefficients=coefficients,
            num_ranks=config.learner.num_ranks,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            packing=config.learner.packing,
        )
        sums: Counter[str] = Counter()
        for plan, part in _micro_batches(plans):
            payloads, _ = fetch_payloads(replace(plan, micro_batches=(part,)), lambda refs: refs)
            batch = collate(part, payloads, packing=config.learner.packing, loops=config.told_loops)
            batch = batch.to(self._student.device)
            if self._reference is not None:
                batch = self._reference.beside(batch)
            try:
                loss = self._objective.of(batch, plan.denominators, plan.coefficients)
                self._student.module.consume(loss)
                value = self._student.module(batch.input_ids, batch.position_ids, batch.logit_index)
            except RunError as error:
                raise InputError(f"replay: step {step}: {error}") from None
            value.backward()
            sums.update(loss.metrics)
        return sums


def _micro_batches(plans: Iterable[StepPlan]) -> Iterable[tuple[StepPlan, tuple[Entry, ...]]]:
    return ((plan, part) for plan in plans for part in plan.micro_batches if part)


class _Watch:
    """Takes down what the objective shows, and the gradient of every token's logits as it comes by."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, list[float]]] = {}

    def __call__(
        self,
        of: WeightedSegment,
        rows: slice,
        batch: TokenBatch,
        loss: torch.Tensor,
        metrics: Mapping[str, torch.Tensor],
    ) -> None:
        segment, number = of.segment, rows.stop - rows.start
        ends = segment.lengths.cumsum(0)
        places = torch.arange(rows.start, rows.stop, device=ends.device)
        rollout = torch.searchsorted(ends, places, right=True)
        position = (places - (ends - segment.lengths)[rollout]).tolist()
        advantage = metrics.get("advantage_used")
        if advantage is None:
            advantage = torch.full((number,), torch.nan)
            if batch.teachers:
                advantage = combined_logprobs(batch.teachers, of.shares) - batch.logprobs.detach()
        into = [self._seen.setdefault(segment.rollout_ids[row], {}) for row in rollout.tolist()]
        for seen, at, *values in zip(into, position, loss.tolist(), advantage.tolist(), strict=True):
            seen[at] = [values[0], 0.0, 0.0, values[1]]

        def take_down(gradient: torch.Tensor) -> None:
            own = -gradient.gather(-1, batch.tokens[:, None])[:, 0]
            sizes = gradient.norm(dim=-1)
            for seen, at, push, size in zip(into, position, own.tolist(), sizes.tolist(), strict=True):
                seen[at][1:3] = push, size

        batch.logits.register_hook(take_down)

    def tokens(self, entries: Sequence[Entry]) -> dict[str, np.ndarray]:
        """By rollout, in units of the mean token of its source."""
        counts: Counter[str] = Counter()
        for entry in entries:
            counts[entry.meta.source] += entry.meta.num_trained_tokens
        scale = np.array([1.0, 1.0, 1.0, 0.0])
        found = {}
        for entry in entries:
            seen = self._seen[entry.meta.rollout_id]
            rows = np.full((entry.meta.num_response_tokens, len(SIGNALS)), np.nan)
            rows[: entry.meta.num_trained_tokens] = [seen[at] for at in range(entry.meta.num_trained_tokens)]
            found[entry.meta.rollout_id] = (rows * (scale * counts[entry.meta.source] + (1 - scale))).astype(np.float32)
        return found
