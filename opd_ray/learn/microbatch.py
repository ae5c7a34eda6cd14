"""From buffer entries to tensors: what each rank trains on, and in which micro-batches.

:func:`plan_step` looks at metas only and runs in the driver. :func:`collate` runs in a learner rank,
on payloads it fetched. Neither knows models, losses or DeepSpeed.

A sequence is prompt + response; the response token t is predicted at position t − 1. The last response
token predicts nothing, so the model's input ends before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.config import LearnerConfig
from opd_ray.errors import RunError
from opd_ray.learn.losses import ScoredTokens
from opd_ray.messages import REFERENCE, SOURCES, Entry, Source, StepPlan
from opd_ray.repetition import repeated_ngrams


class Payload:
    """A RecordBatch whose list columns are read row by row, as slices of their flat values."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def row(self, name: str, index: int) -> np.ndarray:
        """The values of one row of a list column, without a copy."""
        if name not in self._columns:
            column = self._batch.column(name)
            self._columns[name] = (column.values.to_numpy(), column.offsets.to_numpy())
        values, offsets = self._columns[name]
        return values[offsets[index] : offsets[index + 1]]


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a micro-batch that are of one source and have been scored by the same models."""

    source: Source
    rollouts: slice
    """Its rows."""
    tokens: slice
    """Its response tokens."""
    teachers: dict[str, ScoredTokens]
    """By name; empty where no teacher scored these rows."""
    reference: ScoredTokens | None
    given_ids: torch.Tensor | None
    """[tokens, k'] int64: the sampler's own most probable tokens; None where the payload has none."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: B rollouts, student rows before golden and teacher rows, with N response tokens in all.

    Everything per token is in the order of the rows; ``segments`` cover them without a gap.
    """

    input_ids: torch.Tensor
    """[B, T] int64, right-padded; [1, T] when packed."""
    position_ids: torch.Tensor | None
    """[1, T] when packed, restarting at 0 for each rollout; None when padded."""
    logit_index: torch.Tensor
    """[N] int64: position in the flattened input whose logits predict each response token."""
    tokens: torch.Tensor
    """[N] int64 response tokens."""
    repetitive: torch.Tensor
    """[N] float32: 1 where the n-gram that ends here occurred before in the same response."""
    response_lengths: torch.Tensor
    """[B] int64."""
    truncated: torch.Tensor
    """[B] bool: ended by exhausting the length budget."""
    reward_advantages: torch.Tensor
    """[B] float32, 0 unless the loss uses the task's reward."""
    behaviour_logprobs: torch.Tensor
    """[N] float32; nan where no student sampled."""
    segments: tuple[Segment, ...]
    rollout_ids: tuple[str, ...]
    """[B]"""

    def to(self, device: torch.device) -> MicroBatch:
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """The same on ``device``, through the dataclasses of this module."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, ScoredTokens):
        return value.map(lambda tensor: tensor.to(device, non_blocking=True))
    if isinstance(value, MicroBatch | Segment):
        return replace(value, **{item.name: _moved(getattr(value, item.name), device) for item in fields(value)})
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value


def collate(entries: Sequence[Entry], payloads: Mapping[int, Payload], *, packing: bool) -> MicroBatch:
    """Tensors of one micro-batch; ``payloads`` maps ``id(ref)`` of the entries' refs to their payload.

    No entries give one dummy token without response tokens: a rank with nothing left to train on must
    still run forward and backward, because ZeRO's collectives count them. Raises RunError when a
    payload contradicts its meta or its scores do not cover the response.
    """
    ordered = sorted(entries, key=_segment_key)
    prompts = [payloads[id(entry.rollouts)].row("prompt_tokens", entry.row) for entry in ordered]
    responses = [payloads[id(entry.rollouts)].row("response_tokens", entry.row) for entry in ordered]
    for entry, prompt, response in zip(ordered, prompts, responses, strict=True):
        _check_lengths(entry, len(prompt), len(response))
    response_lengths = np.fromiter(map(len, responses), np.int64, len(responses))
    tokens = _concatenate(responses, np.int64)
    input_ids, position_ids, logit_index = _layout(prompts, responses, response_lengths, packing)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        logit_index=torch.from_numpy(logit_index),
        tokens=torch.from_numpy(tokens),
        repetitive=torch.from_numpy(repeated_ngrams(tokens, response_lengths)),
        response_lengths=torch.from_numpy(response_lengths),
        truncated=torch.tensor([entry.meta.truncated for entry in ordered], dtype=torch.bool),
        reward_advantages=torch.tensor([entry.reward_advantage for entry in ordered], dtype=torch.float32),
        behaviour_logprobs=torch.from_numpy(_concatenate([_behaviour(e, payloads) for e in ordered], np.float32)),
        segments=_segments(ordered, payloads),
        rollout_ids=tuple(entry.meta.rollout_id for entry in ordered),
    )


def _segment_key(entry: Entry) -> tuple[int, tuple[str, ...]]:
    return SOURCES.index(entry.meta.source), tuple(sorted(entry.scores))


def _segments(ordered: Sequence[Entry], payloads: Mapping[int, Payload]) -> tuple[Segment, ...]:
    segments, row, token = [], 0, 0
    for (_, roles), members in groupby(ordered, _segment_key):
        group = list(members)
        num_tokens = sum(entry.meta.num_response_tokens for entry in group)
        scores = {role: _scored(group, payloads, role) for role in roles}
        segments.append(
            Segment(
                source=group[0].meta.source,
                rollouts=slice(row, row + len(group)),
                tokens=slice(token, token + num_tokens),
                teachers={role: scored for role, scored in scores.items() if role != REFERENCE},
                reference=scores.get(REFERENCE),
                given_ids=_column(
                    group, [payloads[id(e.rollouts)] for e in group], "topk_ids", np.int64, "ids of its own", None
                ),
            )
        )
        row, token = row + len(group), token + num_tokens
    return tuple(segments)


def _behaviour(entry: Entry, payloads: Mapping[int, Payload]) -> np.ndarray:
    """[tokens] float32: what the student that sampled gave each token; nan for the other sources."""
    num_tokens = entry.meta.num_response_tokens
    if entry.meta.source != "student":
        return np.full(num_tokens, np.nan, np.float32)
    logprobs = payloads[id(entry.rollouts)].row("behaviour_logprobs", entry.row)
    if len(logprobs) != num_tokens:
        raise RunError(
            f"rollout {entry.meta.rollout_id} has {num_tokens} response tokens but {len(logprobs)} behaviour log-probs"
        )
    return logprobs


def _layout(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], response_lengths: np.ndarray, packing: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(input_ids, position_ids or None, logit_index); see MicroBatch."""
    if not prompts:
        position_ids = np.zeros((1, 1), np.int64) if packing else None
        return np.zeros((1, 1), np.int64), position_ids, np.zeros(0, np.int64)
    pieces = [piece for pair in zip(prompts, responses, strict=True) for piece in (pair[0], pair[1][:-1])]
    flat = _concatenate(pieces, np.int64)
    prompt_lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
    lengths = prompt_lengths + response_lengths - 1
    within_row = _ranges(lengths)
    if packing:
        row_starts = np.cumsum(lengths) - lengths
        input_ids, position_ids = flat[None], within_row[None]
    else:
        width = int(lengths.max())
        row_starts = np.arange(len(lengths)) * width
        input_ids, position_ids = np.zeros((len(lengths), width), np.int64), None
        input_ids.reshape(-1)[np.repeat(row_starts, lengths) + within_row] = flat
    first_predictor = row_starts + prompt_lengths - 1
    return input_ids, position_ids, np.repeat(first_predictor, response_lengths) + _ranges(response_lengths)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0 … n − 1 for each n of ``lengths``, concatenated."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _concatenate(pieces: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(pieces).astype(dtype, copy=False) if pieces else np.zeros(0, dtype)


def _scored(group: Sequence[Entry], payloads: Mapping[int, Payload], role: str) -> ScoredTokens:
    """One role's scores of the rows of a segment; what the scorer was not asked for is None (or has k = 0)."""
    score = [payloads[id(entry.scores[role])] for entry in group]

    def column(name: str, dtype: Any, width: int | None = None) -> torch.Tensor | None:
        return _column(group, score, name, dtype, f"{role} {name}", width)

    logprobs = column("logprobs", np.float32, 1)
    ids, alternatives = column("topk_ids", np.int64), column("topk_logprobs", np.float32)
    if logprobs is None:
        raise RunError(f"rollout {group[0].meta.rollout_id} has no {role} log-probs; a scorer answers with them always")
    if (ids is None) != (alternatives is None) or (ids is not None and ids.shape != alternatives.shape):
        raise RunError(f"rollout {group[0].meta.rollout_id}: the {role}'s topk_ids and topk_logprobs differ in number")
    stop = column("stop_logprobs", np.float32, 1)
    none = logprobs.new_zeros(len(logprobs), 0)
    return ScoredTokens(
        logprobs=logprobs[:, 0],
        topk_ids=none.long() if ids is None else ids,
        topk_logprobs=none if alternatives is None else alternatives,
        given_logprobs=column("given_logprobs", np.float32),
        stop_logprobs=None if stop is None else stop[:, 0],
        hidden=column("hidden", None),
    )


def _column(
    group: Sequence[Entry],
    payloads: Sequence[Payload],
    name: str,
    dtype: Any,
    what: str,
    width: int | None,
) -> torch.Tensor | None:
    """[tokens, width] of a column with as many values for every token; None where it is empty.

    ``dtype`` None keeps the payload's. Raises RunError where the values do not cover the response.
    """
    rows = [payload.row(name, entry.row) for entry, payload in zip(group, payloads, strict=True)]
    if not any(map(len, rows)):
        return None
    found = len(rows[0]) // max(group[0].meta.num_response_tokens, 1)
    width = found if width is None else width
    for entry, values in zip(group, rows, strict=True):
        if len(values) != entry.meta.num_response_tokens * width:
            raise RunError(
                f"rollout {entry.meta.rollout_id} has {entry.meta.num_response_tokens} response tokens "
                f"but {len(values)} {what}, expected {width} for each token"
            )
    return torch.from_numpy(_concatenate(rows, rows[0].dtype if dtype is None else dtype).reshape(-1, width))


def _check_lengths(entry: Entry, num_prompt_tokens: int, num_response_tokens: int) -> None:
    meta = entry.meta
    if (num_prompt_tokens, num_response_tokens) != (meta.num_prompt_tokens, meta.num_response_tokens):
        raise RunError(
            f"rollout {meta.rollout_id}: its meta counts {meta.num_prompt_tokens} prompt and "
            f"{meta.num_response_tokens} response tokens, its payload has {num_prompt_tokens} and {num_response_tokens}"
        )
    if num_prompt_tokens == 0 or num_response_tokens == 0:
        raise RunError(f"rollout {meta.rollout_id} has an empty prompt or response: nothing predicts its first token")


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
