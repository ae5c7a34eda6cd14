"""From buffer entries to tensors: what one forward pass of a learner rank trains on.

:func:`collate` works on payloads that :func:`fetch_payloads` got. Neither knows models, losses or DeepSpeed; which
entries share a micro-batch is planned in :mod:`opd_ray.buffer.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.config import LearnerConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import ScoredTokens, Tokens, mapped
from opd_ray.messages import REFERENCE, SOURCES, Entry, RepetitionRule, Source, StepPlan
from opd_ray.models.inputs import lay_out
from opd_ray.repetition import loop_start, repeated_ngrams


class Payloads(dict[int, pa.RecordBatch]):
    """``id(ref)`` to what the ref stands for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._flat: dict[tuple[int, str], tuple[np.ndarray, list[int]]] = {}

    def row(self, entry: Entry, name: str, role: str | None = None) -> np.ndarray:
        """One rollout's values of a list column of its payload, or of a role's scores of it, without a copy; none where
        the payload is of a checkpoint that is older than the column."""
        key = id(entry.rollouts if role is None else entry.scores[role]), name
        if (flat := self._flat.get(key)) is None:
            if name not in (payload := self[key[0]]).schema.names:
                return np.zeros(0)
            column = payload.column(name)
            flat = self._flat[key] = column.values.to_numpy(), column.offsets.to_pylist()
        values, offsets = flat
        return values[offsets[entry.row] : offsets[entry.row + 1]]


@dataclass(frozen=True)
class Segment:
    """Neighbouring rollouts of a micro-batch that are of one source and have been scored by the same models."""

    source: Source
    rollout_ids: tuple[str, ...]
    lengths: torch.Tensor
    """[rollouts] int64: response tokens that are trained on."""
    truncated: torch.Tensor
    """[rollouts] bool: does it not end by itself with these?"""
    tokens: Tokens
    """The [N] response tokens, packed in the order of the rollouts."""
    repetitive: torch.Tensor
    """[N] float32: 1 where the n-gram that ends here occurred before in the same response."""
    weights: torch.Tensor | None = None
    """[rollouts] float32: Entry.weight; None for 1."""
    looped: torch.Tensor | None = None
    """[N] float32: 1 for the copies, after the first, in a response of the student's that was ended as a loop; None
    where that makes no difference."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: rollouts of the student before golden ones and the teacher's."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logit_index: torch.Tensor
    """The three of :func:`~opd_ray.models.inputs.lay_out`."""
    segments: tuple[Segment, ...]
    """In the order of the input; empty for the dummy token."""

    def to(self, device: torch.device) -> MicroBatch:
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))


def collate(
    entries: Sequence[Entry], payloads: Payloads, *, packing: bool, loops: RepetitionRule | None = None
) -> MicroBatch:
    """Tensors of one micro-batch; ``loops`` is the rule whose loops are told apart.

    No entries give one dummy token without response tokens: a rank with nothing left to train on must
    still run forward and backward, because ZeRO's collectives count them. Raises RunError when a
    payload contradicts its meta or its scores do not cover the response.
    """
    ordered = sorted(entries, key=_segment_key)
    prompts, responses = (
        [payloads.row(entry, name) for entry in ordered] for name in ("prompt_tokens", "response_tokens")
    )
    for entry, prompt, response in zip(ordered, prompts, responses, strict=True):
        _check_lengths(entry, len(prompt), len(response))
    trained = [entry.meta.num_trained_tokens for entry in ordered]
    responses = [response[:tokens] for response, tokens in zip(responses, trained, strict=True)]
    tokens = np.concatenate([np.zeros(0, np.int64), *responses])
    repetitive = repeated_ngrams(tokens, np.array(trained, np.int64))
    groups = [list(group) for _, group in groupby(ordered, _segment_key)]
    sizes = [sum(entry.meta.num_trained_tokens for entry in group) for group in groups]
    parts = zip(*(torch.from_numpy(each).split(sizes) for each in (tokens, repetitive)), strict=True)
    segments = [_segment(group, payloads, *part, loops) for group, part in zip(groups, parts, strict=True)]
    return MicroBatch(*lay_out(prompts, responses, packing=packing), tuple(segments))


def _segment_key(entry: Entry) -> tuple[int, tuple[str, ...]]:
    return SOURCES.index(entry.meta.source), tuple(sorted(entry.scores))


def _segment(
    group: Sequence[Entry],
    payloads: Payloads,
    tokens: torch.Tensor,
    repetitive: torch.Tensor,
    loops: RepetitionRule | None,
) -> Segment:
    source = group[0].meta.source
    column = partial(_column, group, payloads)
    behaviour = column("behaviour_logprobs", single=True, required=source == "student")
    lengths = torch.tensor([entry.meta.num_trained_tokens for entry in group])
    rewards = torch.tensor([entry.reward_advantage for entry in group])
    scores = {role: _scored(group, payloads, role) for role in group[0].scores}
    return Segment(
        source=source,
        rollout_ids=tuple(entry.meta.rollout_id for entry in group),
        lengths=lengths,
        truncated=torch.tensor([entry.meta.cut_off for entry in group]),
        tokens=Tokens(
            tokens=tokens,
            behaviour_logprobs=torch.full(tokens.shape, torch.nan) if behaviour is None else behaviour,
            reference=scores.pop(REFERENCE, None),
            teachers=scores,
            given_ids=column("topk_ids"),
            reward_advantages=rewards.repeat_interleave(lengths),
        ),
        repetitive=repetitive,
        weights=torch.tensor([entry.weight for entry in group]),
        looped=_looped(group, payloads, loops) if loops and source == "student" else None,
    )


def _looped(group: Sequence[Entry], payloads: Payloads, rule: RepetitionRule) -> torch.Tensor:
    parts = []
    for entry in group:
        looped = torch.zeros(entry.meta.num_trained_tokens)
        if entry.meta.finish_reason == "repetition":
            looped[loop_start(payloads.row(entry, "response_tokens"), rule) :] = 1.0
        parts.append(looped)
    return torch.cat(parts)


def _scored(group: Sequence[Entry], payloads: Payloads, role: str) -> ScoredTokens:
    """One role's scores of a segment; what the scorer was not asked for is None."""
    column = partial(_column, group, payloads, role=role)
    scored = ScoredTokens(
        logprobs=column("logprobs", single=True, required=True),
        topk_ids=column("topk_ids"),
        topk_logprobs=column("topk_logprobs"),
        given_logprobs=column("given_logprobs"),
        stop_logprobs=column("stop_logprobs", single=True),
        hidden=column("hidden"),
        spans=_spans(group, column("spans", single=True), payloads, role),
    )
    widths = {0 if each is None else each.shape[1] for each in (scored.topk_ids, scored.topk_logprobs)}
    if len(widths) > 1:
        raise RunError(f"rollout {group[0].meta.rollout_id}: the {role}'s topk_ids and topk_logprobs differ in number")
    return scored


def _spans(group: Sequence[Entry], numbers: torch.Tensor | None, payloads: Payloads, role: str) -> torch.Tensor | None:
    """[N] numbers that no two rollouts share. A span of which a horizon leaves a part is none: nobody knows what the
    teacher says of that part."""
    if numbers is None:
        return None
    parts, first = [], 0
    for entry, own in zip(group, numbers.split([each.meta.num_trained_tokens for each in group]), strict=True):
        whole = payloads.row(entry, "spans", role)
        if len(own) < len(whole) and whole[len(own)] == whole[len(own) - 1]:
            own = torch.where(own == own[-1], -1, own)
        parts.append(torch.where(own < 0, -1, own + first))
        first += int(own.max()) + 1
    return torch.cat(parts)


def _column(
    group: Sequence[Entry],
    payloads: Payloads,
    name: str,
    role: str | None = None,
    *,
    single: bool = False,
    required: bool = False,
) -> torch.Tensor | None:
    """[N, k] of a column of the rollouts, or of a role's scores of them; [N] of a single value a token.

    None where it is empty; ids become int64. Raises RunError where the values do not cover the responses.
    """
    what = name if role is None else f"{role} {name}"
    rows = [payloads.row(entry, name, role) for entry in group]
    if not any(map(len, rows)):
        if required:
            raise RunError(f"rollout {group[0].meta.rollout_id} has no {what}, which always come with it")
        return None
    width = 1 if single else len(rows[0]) // group[0].meta.num_response_tokens
    for entry, values in zip(group, rows, strict=True):
        if len(values) != entry.meta.num_response_tokens * width:
            raise RunError(
                f"rollout {entry.meta.rollout_id} has {entry.meta.num_response_tokens} response tokens "
                f"but {len(values)} {what}, expected {width} for each token"
            )
    trained = [values[: entry.meta.num_trained_tokens * width] for entry, values in zip(group, rows, strict=True)]
    flat = torch.from_numpy(np.concatenate(trained))
    flat = flat if flat.is_floating_point() else flat.long()
    return flat if single else flat.reshape(-1, width)


def _check_lengths(entry: Entry, num_prompt_tokens: int, num_response_tokens: int) -> None:
    meta = entry.meta
    if (num_prompt_tokens, num_response_tokens) != (meta.num_prompt_tokens, meta.num_response_tokens):
        raise RunError(
            f"rollout {meta.rollout_id}: its meta counts {meta.num_prompt_tokens} prompt and "
            f"{meta.num_response_tokens} response tokens, its payload has {num_prompt_tokens} and {num_response_tokens}"
        )
    if num_prompt_tokens == 0 or num_response_tokens == 0:
        raise RunError(f"rollout {meta.rollout_id} has an empty prompt or response: nothing predicts its first token")


def fetch_payloads(plan: StepPlan, fetch: Callable[[list[Any]], list[Any]]) -> tuple[Payloads, tuple[str, ...]]:
    """Every distinct payload of a plan, fetched at once, and the ids of the rollouts that lost one.

    Where some are gone, the others are fetched one by one.
    """
    entries = [entry for micro_batch in plan.micro_batches for entry in micro_batch]
    refs = [(entry.rollouts, *entry.scores.values()) for entry in entries]
    distinct = {id(ref): ref for each in refs for ref in each}
    try:
        return Payloads(zip(distinct, fetch(list(distinct.values())), strict=True)), ()
    except Exception as error:
        if not is_loss(error):
            raise
    found = Payloads()
    for key, ref in distinct.items():
        try:
            [found[key]] = fetch([ref])
        except Exception as error:
            if not is_loss(error):
                raise
    lost = (entry for entry, each in zip(entries, refs, strict=True) if any(id(ref) not in found for ref in each))
    return found, tuple(entry.meta.rollout_id for entry in lost)


def is_loss(error: BaseException | None) -> bool:
    """Does an error of ``ray.get`` say that the object is gone, or that the one it was made from is?"""
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

    if isinstance(error, RayTaskError) and not isinstance(error, ObjectLostError):
        return isinstance(error.cause, BaseException) and is_loss(error.cause)
    return isinstance(error, ObjectLostError | RayActorError | WorkerCrashedError | NodeDiedError)


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
