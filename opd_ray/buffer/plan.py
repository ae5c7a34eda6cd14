"""What each learner rank trains on in a step, and in which micro-batches: looks at metas only, runs in the driver."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_ray.messages import SOURCES, Coefficients, Count, Denominators, Entry, Source, StepPlan


def plan_step(
    entries: Sequence[Entry],
    *,
    step: int,
    num_ranks: int,
    micro_batch_tokens: int,
    packing: bool,
    coefficients: Coefficients,
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
        StepPlan(step, tuple(map(tuple, batches)) + ((),) * (most - len(batches)), denominators, coefficients)
        for batches in micro_batches
    ]


def count(entries: Sequence[Entry]) -> Denominators:
    """Rollouts and response tokens of each source."""
    lengths: dict[Source, list[int]] = {source: [] for source in SOURCES}
    for entry in entries:
        lengths[entry.meta.source].append(entry.meta.num_response_tokens)
    return Denominators(**{source: Count(len(rows), sum(rows)) for source, rows in lengths.items()})


def group_advantages(entries: Sequence[Entry], std: bool) -> list[Entry]:
    """The entries with ``reward_advantage`` set on the student's: (r − mean)/std over the responses of one slot.

    The reward r is 1 where the response is correct, else 0; without ``std`` it is only centred. The standard
    deviation is the population's (GRPO, arXiv 2402.03300); equal rewards give 0.
    """
    rewards: dict[int, list[float]] = {}
    for entry in entries:
        if entry.meta.source == "student":
            rewards.setdefault(entry.meta.slot, []).append(float(entry.meta.correct))
    centre = {slot: float(np.mean(group)) for slot, group in rewards.items()}
    spread = {slot: float(np.std(group)) if std else 1.0 for slot, group in rewards.items()}

    def advantage(entry: Entry) -> float:
        slot, reward = entry.meta.slot, float(entry.meta.correct)
        return (reward - centre[slot]) / spread[slot] if spread[slot] > 0 else 0.0

    return [
        replace(entry, reward_advantage=advantage(entry)) if entry.meta.source == "student" else entry
        for entry in entries
    ]


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
