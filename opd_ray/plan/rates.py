"""What each room did in measured steps, and at which split of workers no room would wait. Pure.

A room's rate is tokens a second of its own work: what one of its workers could do if nothing ever made it wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_ray.config import Config
from opd_ray.watch.observers import StepReport

_MAKERS = {"student": ["generate"], "golden": [], "teacher": ["teacher_generate"]}
"""Who makes the rollouts of a source."""
_MOST_WORKERS = 10_000
_WORTH_IT = 0.05
"""Share of a step that another split must save to be proposed."""


class Tokens:
    """Observer that counts the response tokens that each room had to do with, step by step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    async def on_step(self, report: StepReport) -> None:
        """Adds a step: by room, and all that were trained on as "learn"."""
        counts: Counter[str] = Counter()
        for entry in report.entries:
            rooms = [*_MAKERS[entry.meta.source], *entry.scores]
            counts.update(dict.fromkeys(rooms, entry.meta.num_response_tokens))
            counts["learn"] += entry.meta.num_trained_tokens  # fewer of what a horizon leaves
        self.steps.append(counts)


@dataclass(frozen=True)
class RoomRate:
    """One room in the mean of the measured steps."""

    room: str
    workers: int
    tokens: float
    """That it had to do with, a step."""
    busy_s: float
    """Seconds of work a step, of all its workers together."""
    cpus: float
    """Ray CPUs that a worker reserves."""
    gpus: float

    @property
    def tokens_per_s(self) -> float:
        """Of one worker's own work."""
        return self.tokens / self.busy_s if self.busy_s else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step in which each worker has work."""
        return self.busy_s / self.workers

    def idle_share(self, step_s: float) -> float:
        return 1 - self.step_s / step_s


def measured(rows: Sequence[Mapping[str, Any]], tokens: Sequence[Counter[str]], config: Config) -> list[RoomRate]:
    """The rooms in some steps: their rows of metrics.jsonl, and what :class:`Tokens` counted in the same steps."""
    total = sum(tokens, Counter())
    found = []
    for room, (workers, cpus, gpus) in _workers(config).items():
        busy = workers * sum((1 - row.get(f"idle/{room}", 1.0)) * row["throughput/step_s"] for row in rows)
        found.append(RoomRate(room, workers, total[room] / len(rows), busy / len(rows), cpus, gpus))
    return found


def _workers(config: Config) -> dict[str, tuple[int, float, float]]:
    """Room to its workers, and the CPUs and GPUs that each of them reserves."""
    rollout, learner = config.rollout, config.learner
    engine = (rollout.cpus_per_generator, rollout.gpus_per_generator * rollout.tensor_parallel_size)
    found = {
        "generate": (rollout.num_generators, *engine),
        "learn": (learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank),
    }
    for role, scorer in config.scorers.items():
        found[role] = (scorer.num_actors, scorer.cpus_per_actor, scorer.gpus_in_all)
    if config.buffer.has_teacher_write:
        found["teacher_generate"] = (rollout.teacher_generators, *engine)
    return found


def step_s(rooms: Sequence[RoomRate], *, synchronous: bool, cores: float) -> float:
    """Seconds that a step would take if nothing but work took time: its slowest room's where all work at once, all of
    theirs where the run is synchronous (max_staleness 0); and never less than the work of rooms without GPUs spread
    over the machines' cores."""
    together = sum if synchronous else max
    on_cpus = sum(room.busy_s for room in rooms if not room.gpus)
    return max(together(room.step_s for room in rooms), on_cpus / cores)


@dataclass(frozen=True)
class Split:
    """How many workers each room would have, and what a step would then take."""

    workers: Mapping[str, int]
    step_s: float


def propose(
    rooms: Sequence[RoomRate],
    measured_s: float,
    *,
    synchronous: bool,
    cores: float,
    cpus: float,
    gpus: float,
    fits: Callable[[Mapping[str, int]], bool] = lambda workers: True,
) -> Split | None:
    """The split of ``cpus`` and ``gpus`` at which a step takes least, with as few workers as that takes; None where it
    would save less than a twentieth of the measured ``measured_s``. ``fits``: is there memory for so many workers?

    From one worker each, whichever room takes longest gets one more, for as long as the resources last and steps become
    shorter. A room's work is taken to divide evenly between its workers, the learner's too; what a step took beyond the
    rooms' work is taken to grow with it.
    """
    now = step_s(rooms, synchronous=synchronous, cores=cores)
    split = [replace(room, workers=1) for room in rooms]
    best, best_s = split, step_s(split, synchronous=synchronous, cores=cores)
    while True:
        slowest = max(range(len(split)), key=lambda index: split[index].step_s)
        split = [replace(room, workers=room.workers + (index == slowest)) for index, room in enumerate(split)]
        if _exceeds(split, cpus, gpus) or not fits(_numbers(split)):
            break
        if (seconds := step_s(split, synchronous=synchronous, cores=cores)) < best_s * (1 - 1e-9):
            best, best_s = split, seconds
    if now == 0 or best_s / now > 1 - _WORTH_IT:
        return None
    return Split(_numbers(best), measured_s * best_s / now)


def _numbers(rooms: Sequence[RoomRate]) -> dict[str, int]:
    return {room.room: room.workers for room in rooms}


def _exceeds(rooms: Sequence[RoomRate], cpus: float, gpus: float) -> bool:
    asked_cpus, asked_gpus = (sum(room.workers * getattr(room, kind) for room in rooms) for kind in ("cpus", "gpus"))
    workers = sum(room.workers for room in rooms)  # of which some may reserve nothing
    return asked_cpus > cpus + 1e-6 or asked_gpus > gpus + 1e-6 or workers > _MOST_WORKERS
