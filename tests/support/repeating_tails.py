"""The rule by which engines end responses that repeat themselves, by its definition."""

from __future__ import annotations

from collections.abc import Sequence

from opd_ray.messages import RepetitionRule


def repeats(tokens: Sequence[int], rule: RepetitionRule) -> bool:
    """Whether its last tokens are one pattern ``min_count`` times."""
    tokens = list(tokens)
    return any(
        len(tokens) >= size * rule.min_count and tokens[-size * rule.min_count :] == tokens[-size:] * rule.min_count
        for size in range(rule.min_pattern_size, rule.max_pattern_size + 1)
    )


def first_repeat(tokens: Sequence[int], rule: RepetitionRule) -> int | None:
    """How many tokens there are when the rule first holds."""
    return next((end for end in range(1, len(tokens) + 1) if repeats(tokens[:end], rule)), None)
