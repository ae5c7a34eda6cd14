"""Where a run stands right now: what the driver's parts note as they go, for status and log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from opd_ray.status import Phase


@dataclass
class Whereabouts:
    """The driver's phase, and since when; one for a run."""

    phase: Phase = "starting"
    since: float = field(default_factory=time.monotonic)
    step: int = 0
    """Finished optimizer steps."""
    version: int = 0
    """Of the weights that the generators hold."""
    last_step_at: float | None = None
    checkpoint_step: int | None = None
    note: str | None = None
    """How the run ended."""

    def enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()

    def finish_step(self, step: int) -> None:
        self.step, self.last_step_at = step, time.monotonic()
