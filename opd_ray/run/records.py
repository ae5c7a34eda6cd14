"""What a run writes as it goes on: its metrics, its verdicts, what happens besides its steps, and what trackers get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_ray.config import Config
from opd_ray.evaluation import verdicts
from opd_ray.evaluation.scores import Evaluation
from opd_ray.rooms import Rooms
from opd_ray.rooms.threads import in_thread
from opd_ray.run.provenance import provenance
from opd_ray.status.state import Whereabouts
from opd_ray.watch.events import Events
from opd_ray.watch.metrics import MetricsWriter
from opd_ray.watch.trace import Trace
from opd_ray.watch.trackers import Tracked
from opd_ray.watch.tracking import Tracking


class Records:
    """Those of one run; what happens carries the step and the version of the weights that it happened at."""

    provenance: dict[str, Any]
    """What this start of the run is made with; there from ``begin`` on."""
    writer: MetricsWriter
    """Of the attempt that is at work; there from ``go_on`` on."""

    def __init__(self, config: Config, run_dir: Path, where: Whereabouts, rooms: Rooms) -> None:
        self._config, self._run_dir, self._where = config, run_dir, where
        self._events = Events(run_dir / "events.jsonl")
        self.tracking = Tracking(Tracked(run_dir, config), self.say)
        self._trace: Trace | None = None
        if config.metrics.trace:
            self._trace = trace = Trace(run_dir, rooms, self.say, where.since)
            where.left = lambda phase, began, ended: trace.phase(phase, began, ended, where.step)

    def say(self, kind: str, text: str, **fields: Any) -> None:
        """What people are told of, too."""
        self._tell(self._events.say, kind, text, fields)

    def note(self, kind: str, text: str, **fields: Any) -> None:
        """What the console says already, or need not say."""
        self._tell(self._events.note, kind, text, fields)

    def _tell(self, how: Callable[..., None], kind: str, text: str, fields: dict[str, Any]) -> None:
        how(kind, text, **{"step": self._where.step, "version": self._where.version, **fields})
        if self._trace is not None:
            self._trace.mark(kind, text)

    async def begin(self, step: int, *, continued: bool) -> None:
        """A start of the run."""
        config = self._config
        how = f"goes on after step {step}" if continued else "begins"
        text = f"{self._run_dir.name} {how}: {config.method}, seed {config.seed}, {config.learner.steps} steps"
        self.provenance = await in_thread(provenance)
        facts = {"steps": config.learner.steps, "continued": continued, "run_dir": self._run_dir, **self.provenance}
        self.note("start", text, **facts)
        await self.go_on(step, continued=continued)
        if self._trace is not None:
            self._trace.start()

    async def go_on(self, step: int, *, continued: bool) -> None:
        """Metrics, rollout log and verdicts go on after ``step``; what they have of later steps does not count."""
        await in_thread(self._open, step, continued)

    async def evaluated(self, evaluation: Evaluation) -> None:
        """Keeps an evaluation outside of the steps, before or after them."""
        step = self._where.step
        await in_thread(self.writer.write, step, evaluation.metrics())
        await in_thread(verdicts.write, verdicts.directory(self._run_dir, step), evaluation.verdicts)

    async def close(self) -> None:
        """How the run ended, and all files."""
        where = self._where
        text = f"{where.phase}: {where.step} of {self._config.learner.steps} steps"
        self.note("end", text + (f": {where.note}" if where.note else ""), phase=where.phase)
        if self._trace is not None:
            await self._trace.close()
        await in_thread(self.writer.close)
        await in_thread(self.tracking.close)

    def _open(self, step: int, continued: bool) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
        steps = self._config.learner.steps
        self.writer = MetricsWriter(self._run_dir, self.tracking, step, continued=continued, steps=steps)
        for path in (self._run_dir / "rollouts").glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        verdicts.forget(self._run_dir, step)
