"""What each learner rank trains on in a step, and in which micro-batches: looks at metas only, runs in the driver."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_ray.messages import SOURCES, Coefficients, Count, Denominators, Entry, Source, StepPlan

_UNEVEN = 1.02
"""Of the tokens of the rank that has most, how many it may have so that fewer nodes are sent a payload."""


def plan_step(
    entries: Sequence[Entry],
    *,
    step: int,
    num_ranks: int,
    micro_batch_tokens: int,
    packing: bool,
    coefficients: Coefficients,
    nodes: Sequence[str] = (),
) -> list[StepPlan]:
    """One plan per rank: every entry exactly once, the same number of micro-batches everywhere.

    Ranks are balanced by tokens (longest rollout first, to the rank with the fewest so far). ``nodes``: that of each
    rank. A payload is sent whole to every node with a rank that trains on a row of it; where ranks are on several,
    payloads stay together on a node as long as that makes no rank's tokens more than 2 % more. Within a rank,
    neighbours in length share a micro-batch of at most ``micro_batch_tokens``: rows × longest row, or
    the sum of the rows when packing. A rollout longer than that gets a micro-batch of its own. The same
    entries give the same plan in any order. Raises ValueError without entries.
    """
    if not entries:
        raise ValueError("a step needs at least one rollout, got none")
    longest_first = sorted(entries, key=lambda entry: (-entry.meta.num_tokens, entry.meta.rollout_id))
    shares = _shares(longest_first, range(num_ranks))
    if len(set(nodes)) > 1:
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, node in enumerate(nodes):
            ranks[node].append(rank)
        together = dict[int, list[Entry]]()
        for own, those in zip(_parts(longest_first, [*map(len, ranks.values())]), ranks.values(), strict=True):
            together |= _shares(own, those)
        if max(map(_tokens, together.values())) <= _UNEVEN * max(map(_tokens, shares.values())):
            shares = together
    micro_batches = [_split(shares[rank], micro_batch_tokens, packing) for rank in range(num_ranks)]
    most = max(map(len, micro_batches))
    denominators = count(entries)
    return [
        StepPlan(step, tuple(map(tuple, batches)) + ((),) * (most - len(batches)), denominators, coefficients)
        for batches in micro_batches
    ]


def count(entries: Sequence[Entry]) -> Denominators:
    """Rollouts of each source and their response tokens that are trained on."""
    lengths: dict[Source, list[int]] = {source: [] for source in SOURCES}
    for entry in entries:
        lengths[entry.meta.source].append(entry.meta.num_trained_tokens)
    return Denominators(**{source: Count(len(rows), sum(rows)) for source, rows in lengths.items()})


def group_advantages(entries: Sequence[Entry], std: bool) -> list[Entry]:
    """The entries with ``reward_advantage`` set on the student's: (r − mean)/std over the responses of one slot.

    The reward r is 1 where the response is correct, else 0; without ``std`` it is only centred. The standard
    deviation is the population's (GRPO, arXiv 2402.03300); equal rewards give 0. What evidence leaves to something else
    than the reward has 0 and is not part of a group.
    """
    rewards: dict[int, list[float]] = defaultdict(list)

    def has_one(entry: Entry) -> bool:
        return entry.meta.source == "student" and entry.taught_by in (None, "reward")

    for entry in filter(has_one, entries):
        rewards[entry.meta.slot].append(float(entry.meta.correct))

    def advantage(entry: Entry) -> float:
        if not has_one(entry):
            return 0.0
        group = np.array(rewards[entry.meta.slot])
        spread = group.std() if std else 1.0
        return float((entry.meta.correct - group.mean()) / spread) if spread > 0 else 0.0

    return [replace(entry, reward_advantage=advantage(entry)) for entry in entries]


def _shares(longest_first: Sequence[Entry], ranks: Sequence[int]) -> dict[int, list[Entry]]:
    """Rank to what it trains on."""
    shares: dict[int, list[Entry]] = {rank: [] for rank in ranks}
    loads = [(0, rank) for rank in ranks]
    for entry in longest_first:
        load, rank = heapq.heappop(loads)
        shares[rank].append(entry)
        heapq.heappush(loads, (load + entry.meta.num_tokens, rank))
    return shares


def _parts(longest_first: Sequence[Entry], sizes: Sequence[int]) -> list[list[Entry]]:
    """Parts in the proportion of ``sizes``, by tokens, with at most one payload in two neighbours; longest first.

    One part after the other is filled with one payload after the other, and of one that does not fit with those of its
    rollouts that do.
    """
    payloads: dict[int, list[int]] = defaultdict(list)
    for at, entry in enumerate(longest_first):
        payloads[id(entry.rollouts)].append(at)
    share = _tokens(longest_first) / sum(sizes)
    part_of = [0] * len(longest_first)
    part, room = 0, share * sizes[0]
    for rollouts in payloads.values():
        while rollouts:
            left = []
            for at in rollouts:
                tokens = longest_first[at].meta.num_tokens
                if tokens <= room or part == len(sizes) - 1:
                    part_of[at], room = part, room - tokens
                else:
                    left.append(at)
            if rollouts := left:
                part += 1
                room += share * sizes[part]
    parts: list[list[Entry]] = [[] for _ in sizes]
    for entry, part in zip(longest_first, part_of, strict=True):
        parts[part].append(entry)
    return parts


def _tokens(entries: Sequence[Entry]) -> int:
    return sum(entry.meta.num_tokens for entry in entries)


def _split(longest_first: Sequence[Entry], max_tokens: int, packing: bool) -> list[list[Entry]]:
    """First-fit decreasing: each row goes to the first micro-batch with room for it.

    Packed there is room for tokens; padded for rows, which are as long as the first of their micro-batch.
    """
    if packing:
        return _packed(longest_first, max_tokens)
    batches: list[list[Entry]] = []
    most = 0
    for entry in longest_first:
        if not batches or len(batches[-1]) == most:
            batches.append([])
            most = max(1, max_tokens // entry.meta.num_tokens)
        batches[-1].append(entry)
    return batches


def _packed(longest_first: Sequence[Entry], max_tokens: int) -> list[list[Entry]]:
    """Finds the first micro-batch with room in a tree: looked for one by one, 20,000 rollouts took seconds."""
    most = 1 << max(0, len(longest_first) - 1).bit_length()
    batches: list[list[Entry]] = [[] for _ in range(most)]
    room = [max_tokens] * (2 * most)  # the batches' at most + their number; half way up, the larger one of two
    for entry in longest_first:
        needs, at = min(entry.meta.num_tokens, max_tokens), 1
        while at < most:
            at = 2 * at if room[2 * at] >= needs else 2 * at + 1
        batches[at - most].append(entry)
        room[at] -= needs
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return [batch for batch in batches if batch]
