"""From buffer entries to tensors: what each rank trains on, and in which micro-batches.

:func:`plan_step` looks at metas only and runs in the driver. :func:`collate` runs in a learner rank,
on payloads it fetched. Neither knows models, losses or DeepSpeed.

A sequence is prompt + response; the response token t is predicted at position t − 1. The last response
token predicts nothing, so the model's input ends before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.errors import RunError
from opd_ray.losses import ScoredTokens
from opd_ray.messages import Denominators, Entry, StepPlan

REPETITIVE_NGRAM = 6
"""Tokens that must recur for the last of them to count as repetitive."""
_HASH_FACTOR = 6_364_136_223_846_793_005


def plan_step(
    entries: Sequence[Entry], *, step: int, num_ranks: int, micro_batch_tokens: int, packing: bool
) -> list[StepPlan]:
    """One plan per rank: every entry exactly once, the same number of micro-batches everywhere.

    Ranks are balanced by tokens (longest rollout first, to the rank with the fewest so far). Within a rank,
    neighbours in length share a micro-batch of at most ``micro_batch_tokens``: rows × longest row, or
    the sum of the rows when packing. A rollout longer than that gets a micro-batch of its own. The same
    entries give the same plan in any order. Raises ValueError without entries.
    """
    if not entries:
        raise ValueError("a step needs at least one rollout, got none")
    longest_first = sorted(entries, key=lambda entry: (-entry.meta.num_tokens, entry.meta.rollout_id))
    shares: list[list[Entry]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for entry in longest_first:
        load, rank = heapq.heappop(loads)
        shares[rank].append(entry)
        heapq.heappush(loads, (load + entry.meta.num_tokens, rank))
    split = _split_packed if packing else _split_padded
    micro_batches = [split(share, micro_batch_tokens) for share in shares]
    most = max(map(len, micro_batches))
    denominators = count(entries)
    return [
        StepPlan(step, tuple(map(tuple, batches)) + ((),) * (most - len(batches)), denominators)
        for batches in micro_batches
    ]


def count(entries: Sequence[Entry]) -> Denominators:
    """Rollouts and response tokens of each source."""
    student = [entry.meta.num_response_tokens for entry in entries if entry.meta.source == "student"]
    golden = [entry.meta.num_response_tokens for entry in entries if entry.meta.source == "golden"]
    return Denominators(len(student), sum(student), len(golden), sum(golden))


def _split_padded(longest_first: Sequence[Entry], max_tokens: int) -> list[list[Entry]]:
    """Consecutive rows whose padded rectangle fits; the first row of each is its longest."""
    batches: list[list[Entry]] = []
    for entry in longest_first:
        if batches and (len(batches[-1]) + 1) * batches[-1][0].meta.num_tokens <= max_tokens:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    return batches


def _split_packed(longest_first: Sequence[Entry], max_tokens: int) -> list[list[Entry]]:
    """First-fit decreasing: each row goes to the first micro-batch with room for it."""
    batches: list[list[Entry]] = []
    room: list[int] = []
    for entry in longest_first:
        tokens = entry.meta.num_tokens
        fit = next((index for index, left in enumerate(room) if left >= tokens), None)
        if fit is None:
            batches.append([entry])
            room.append(max_tokens - tokens)
        else:
            batches[fit].append(entry)
            room[fit] -= tokens
    return batches


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
class MicroBatch:
    """One forward pass: B rollouts, student rows before golden rows, with N response tokens in all.

    Everything per token is in the order of the rows, so the first ``num_student_tokens`` are the student's.
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
    behaviour_logprobs: torch.Tensor
    """[student tokens] float32."""
    teacher: ScoredTokens | None
    """Of the student tokens; None when no entry carries teacher scores."""
    reference: ScoredTokens | None
    num_student_rollouts: int
    num_student_tokens: int
    rollout_ids: tuple[str, ...]
    """[B]"""

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
            elif isinstance(value, ScoredTokens):
                moved[field.name] = ScoredTokens(
                    value.logprobs.to(device), value.topk_ids.to(device), value.topk_logprobs.to(device)
                )
        return replace(self, **moved)


def collate(entries: Sequence[Entry], payloads: Mapping[int, Payload], *, packing: bool) -> MicroBatch:
    """Tensors of one micro-batch; ``payloads`` maps ``id(ref)`` of the entries' refs to their payload.

    No entries give one dummy token without response tokens: a rank with nothing left to train on must
    still run forward and backward, because ZeRO's collectives count them. Raises RunError when a
    payload contradicts its meta or its scores do not cover the response.
    """
    ordered = sorted(entries, key=lambda entry: entry.meta.source != "student")
    students = [entry for entry in ordered if entry.meta.source == "student"]
    prompts = [payloads[id(entry.rollouts)].row("prompt_tokens", entry.row) for entry in ordered]
    responses = [payloads[id(entry.rollouts)].row("response_tokens", entry.row) for entry in ordered]
    for entry, prompt, response in zip(ordered, prompts, responses, strict=True):
        _check_lengths(entry, len(prompt), len(response))
    behaviour = [payloads[id(entry.rollouts)].row("behaviour_logprobs", entry.row) for entry in students]
    response_lengths = np.fromiter(map(len, responses), np.int64, len(responses))
    tokens = _concatenate(responses, np.int64)
    input_ids, position_ids, logit_index = _layout(prompts, responses, response_lengths, packing)
    num_student_tokens = int(response_lengths[: len(students)].sum())
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        logit_index=torch.from_numpy(logit_index),
        tokens=torch.from_numpy(tokens),
        repetitive=torch.from_numpy(repeated_ngrams(tokens, response_lengths)),
        response_lengths=torch.from_numpy(response_lengths),
        behaviour_logprobs=torch.from_numpy(_concatenate(behaviour, np.float32)),
        teacher=_scored(students, payloads, "teacher"),
        reference=_scored(students, payloads, "reference"),
        num_student_rollouts=len(students),
        num_student_tokens=num_student_tokens,
        rollout_ids=tuple(entry.meta.rollout_id for entry in ordered),
    )


def repeated_ngrams(tokens: np.ndarray, lengths: np.ndarray, n: int = REPETITIVE_NGRAM) -> np.ndarray:
    """[N] float32 over the packed ``tokens`` of rows of ``lengths``: 1 where a token ends an n-gram that its row
    held before (METHOD §2). N-grams are told apart by a 64-bit hash."""
    repeated = np.zeros(len(tokens), np.float32)
    key = np.repeat(np.arange(len(lengths)), lengths)
    for back in range(n):
        key = key * _HASH_FACTOR + np.roll(tokens, back)  # wraps around on purpose
    ends = np.flatnonzero(_ranges(lengths) >= n - 1)
    _, first = np.unique(key[ends], return_index=True)
    repeated[ends] = 1.0
    repeated[ends[first]] = 0.0
    return repeated


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


def _scored(students: Sequence[Entry], payloads: Mapping[int, Payload], role: str) -> ScoredTokens | None:
    """One role's scores of the student rows; an empty micro-batch has them empty, with k = 1."""
    if not students:
        empty = torch.zeros(0)
        return ScoredTokens(empty, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
    if not any(role in entry.scores for entry in students):
        return None
    logprobs, ids, alternatives = [], [], []
    for entry in students:
        if role not in entry.scores:
            raise RunError(f"rollout {entry.meta.rollout_id} carries no {role} scores while others of its batch do")
        payload = payloads[id(entry.scores[role])]
        logprobs.append(payload.row("logprobs", entry.row))
        ids.append(payload.row("topk_ids", entry.row))
        alternatives.append(payload.row("topk_logprobs", entry.row))
        if len(logprobs[-1]) != entry.meta.num_response_tokens:
            raise RunError(
                f"rollout {entry.meta.rollout_id} has {entry.meta.num_response_tokens} response tokens "
                f"but {len(logprobs[-1])} {role} log-probs"
            )
    flat = _concatenate(logprobs, np.float32)
    shape = (len(flat), sum(map(len, ids)) // max(len(flat), 1))
    return ScoredTokens(
        torch.from_numpy(flat),
        torch.from_numpy(_concatenate(ids, np.int64).reshape(shape)),
        torch.from_numpy(_concatenate(alternatives, np.float32).reshape(shape)),
    )


def _check_lengths(entry: Entry, num_prompt_tokens: int, num_response_tokens: int) -> None:
    meta = entry.meta
    if (num_prompt_tokens, num_response_tokens) != (meta.num_prompt_tokens, meta.num_response_tokens):
        raise RunError(
            f"rollout {meta.rollout_id}: its meta counts {meta.num_prompt_tokens} prompt and "
            f"{meta.num_response_tokens} response tokens, its payload has {num_prompt_tokens} and {num_response_tokens}"
        )
    if num_prompt_tokens == 0 or num_response_tokens == 0:
        raise RunError(f"rollout {meta.rollout_id} has an empty prompt or response: nothing predicts its first token")
