"""The state of a run at a step boundary, as refs: what every restore goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opd_ray.messages import Entry, RolloutMeta

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

    def with_parts(self, instead: Mapping[Any, Any]) -> Snapshot:
        """The snapshot with something else in the place of every ref: the names of files, or the other way round."""
        return replace(
            self,
            learner_parts=tuple(instead[part] for part in self.learner_parts),
            followers={role: (facts, instead[part]) for role, (facts, part) in self.followers.items()},
            entries=tuple(
                replace(
                    entry,
                    rollouts=instead[entry.rollouts],
                    scores={role: instead[scores] for role, scores in entry.scores.items()},
                )
                for entry in self.entries
            ),
        )

    @staticmethod
    def from_plain(raw: Mapping[str, Any]) -> Snapshot:
        """The snapshot of names that ``raw`` is the JSON of."""
        entries = [Entry(**(entry | {"meta": RolloutMeta(**entry["meta"])})) for entry in raw["entries"]]
        return Snapshot(
            **{
                **raw,
                "learner_parts": tuple(raw["learner_parts"]),
                "followers": {role: (facts, name) for role, (facts, name) in raw["followers"].items()},
                "slots": tuple(raw["slots"]),
                "entries": tuple(entries),
            }
        )
