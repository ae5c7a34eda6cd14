"""The state of a run at a step boundary, as refs: what every restore goes through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opd_ray.messages import Entry

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class Snapshot:
    """A run after ``step`` optimizer steps; arrays and payloads stay in Ray's object store."""

    step: int
    learner_facts: dict[str, Any]
    """What the learner says about its parts; plain JSON values."""
    learner_parts: tuple[ObjectRef, ...]
    """One dict[str, np.ndarray] per rank that saved."""
    followers: dict[str, tuple[dict[str, Any], ObjectRef]] = field(default_factory=dict)
    """Role of a scorer that follows the student to its facts {"version": int} and its dict[str, np.ndarray]."""
    slots: tuple[int, ...] = ()
    """Slots that the buffer holds scored; one may have no entries."""
    entries: tuple[Entry, ...] = ()
    """The rollouts of those slots."""
    state: dict[str, Any] = field(default_factory=dict)
    """Everything else; plain JSON values, with "healthy" among them."""
