"""What each learner rank trains on in a step, and in which micro-batches: looks at metas only, runs in the driver."""

from __future__ import annotations

import heapq
from collections import defaultdict
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
    micro_batches = [_split(share, micro_batch_tokens, packing) for share in shares]
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
    rewards: dict[int, list[float]] = defaultdict(list)
    for entry in entries:
        if entry.meta.source == "student":
            rewards[entry.meta.slot].append(float(entry.meta.correct))

    def advantage(entry: Entry) -> float:
        if entry.meta.source != "student":
            return 0.0
        group = np.array(rewards[entry.meta.slot])
        spread = group.std() if std else 1.0
        return float((entry.meta.correct - group.mean()) / spread) if spread > 0 else 0.0

    return [replace(entry, reward_advantage=advantage(entry)) for entry in entries]


def _split(longest_first: Sequence[Entry], max_tokens: int, packing: bool) -> list[list[Entry]]:
    """First-fit decreasing: each row goes to the first micro-batch with room for it.

    Packed there is room for tokens; padded for rows, which are as long as the first of their micro-batch.
    """
    batches: list[list[Entry]] = []
    room: list[int] = []
    for entry in longest_first:
        tokens = entry.meta.num_tokens
        needs = tokens if packing else 1
        fit = next((index for index, left in enumerate(room) if left >= needs), None)
        if fit is None:
            fit = len(batches)
            batches.append([])
            room.append(max(needs, max_tokens if packing else max_tokens // tokens))
        batches[fit].append(entry)
        room[fit] -= needs
    return batches
