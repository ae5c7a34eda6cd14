"""The configuration's sections that keep a run going: guard, checkpoints, recovery, the size of pools, deadlines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from opd_ray.config.method import STRICT
from opd_ray.messages import PoolSize


def check_size(what: str, start: int, minimum: int | None, maximum: int | None) -> None:
    """Raises ValueError unless minimum ≤ start ≤ maximum."""
    size = PoolSize.of(start, minimum, maximum)
    if not size.minimum <= size.start <= size.maximum:
        raise ValueError(
            f"min_{what}={size.minimum}, num_{what}={size.start}, max_{what}={size.maximum}: must not fall"
        )


Thresholds = tuple[float, float, float]
"""Of a signal: (warn, act, roll back)."""


def _rising(shares: Thresholds) -> Thresholds:
    if not 0 <= shares[0] <= shares[1] <= shares[2] < 1:
        raise ValueError(f"expected 0 ≤ warn ≤ act ≤ roll back < 1, got {shares}")
    return shares


def _falling(levels: Thresholds) -> Thresholds:
    if not levels[0] >= levels[1] >= levels[2] >= 0:
        raise ValueError(f"expected warn ≥ act ≥ roll back ≥ 0, got {levels}")
    return levels


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """What raises an alarm, and how far the guard may go; thresholds of three are (warn, act, roll back). Those of
    shares count from the run's normal level, and are crossed only beyond the error of some hundred rollouts."""

    level: Annotated[
        Literal["off", "warn", "act", "rollback", "stop"],
        BeforeValidator(lambda level: "off" if level is False else level),  # as YAML reads a bare off
    ] = "act"
    """The most the guard may do; each level includes those before it."""
    truncated_token_share: Annotated[Thresholds, AfterValidator(_rising)] = (0.1, 0.25, 0.7)
    """Share of the tokens that stand in truncated rollouts, the earliest sign of inflation: from where the guard warns,
    acts, and rolls back."""
    truncation_rate: Annotated[Thresholds, AfterValidator(_rising)] = (0.1, 0.25, 0.5)
    """Share of rollouts that are truncated: from where the guard warns, acts, and rolls back."""
    repetition_rate: Annotated[Thresholds, AfterValidator(_rising)] = (0.05, 0.15, 0.4)
    """Share of rollouts whose tail is repetitive: from where the guard warns, acts, and rolls back."""
    entropy: Annotated[Thresholds, AfterValidator(_falling)] = (0.02, 0.01, 0.003)
    """Entropy in nats under which a student with vanishing gradient, whom the teacher contradicts, is deterministic:
    below which the guard warns, acts, and rolls back."""
    min_horizon: float = Field(0.25, gt=0, le=1)
    """Share of rollout.horizon, or else of the length budget, up to which the guard's first action has responses
    sampled; when health returns it is doubled step by step. 1 leaves it alone, as losses with a reward do."""
    max_golden_per_prompt: float = Field(2.0, ge=0)
    """Limit of golden rollouts for each on-policy prompt; 0 leaves them alone."""
    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks of one run; then it is stopped, where level allows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Checkpoints: what --resume, a rollback and a lost learner rank continue from."""

    directory: str | None = None
    """Where they go: a local directory or a URI (s3://, gs://, ... as pyarrow.fs or fsspec opens it), of this run
    alone: {run} in it stands for the name of the run directory. By default checkpoints/ in the run directory."""
    every_steps: int = Field(50, ge=0)
    """Save every so many steps, and after the last; 0 for never."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted."""
    memory_every_steps: int = Field(10, ge=0)
    """Keep a copy in Ray's object store every so many steps, from which a lost learner rank is replaced; 0 for none."""
    retry_s: float = Field(900.0, ge=0)
    """How long writing is tried again, while the run goes on, when the storage does not answer; then the run ends."""
    grace_s: float = Field(25.0, gt=0)
    """On SIGTERM: time to save the newest state in memory, to finish the step under way and to save that, too."""

    def __post_init__(self) -> None:
        if self.directory is not None and (not self.directory or self.directory.startswith("~")):
            raise ValueError(f"directory={self.directory!r} is taken as it stands; give a whole path, or a URI")

    def location(self, run_dir: Path) -> str:
        """Where the checkpoints of the run in ``run_dir`` go."""
        return str(self.directory or run_dir / "checkpoints").replace("{run}", run_dir.name)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecoveryConfig:
    """What happens when workers die."""

    max_restarts: int = Field(20, ge=0)
    """Replacements of a room's workers within half an hour; one more ends the run. 0 ends it with the first death."""
    below_min_s: float = Field(900.0, gt=0)
    """How long a room may have fewer workers than its minimum before the run ends."""
    heartbeat_s: float = Field(60.0, ge=0)
    """A worker that does not answer for so long counts as dead; 0 waits for the deadlines of its calls."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ElasticConfig:
    """When pools with room between their minimum and maximum grow and shrink."""

    grow_after_s: float = Field(15.0, ge=0)
    """A pool that was the bottleneck for so long gets one more worker."""
    shrink_after_s: float = Field(120.0, ge=0)
    """A pool that could do with one worker less for so long gives one back."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeadlineConfig:
    """How long the driver waits before a worker that gave no answer counts as lost.

    The limits of generators and scorers count from a worker's last answer, or from its oldest call where that is
    newer. Calls wait in the driver until a worker has room, and no limit counts while they do: one call has to fit in,
    not the queue before it.
    """

    start_s: float = Field(600.0, gt=0)
    """Placement, model loading and the rendezvous of one room."""
    generate_s: float = Field(1800.0, gt=0)
    """A generator with calls that answers none for so long is lost: longer than its longest responses may take,
    evaluation's included."""
    score_s: float = Field(600.0, gt=0)
    """A scorer with calls that answers none for so long is lost: longer than one call may take."""
    train_s: float = Field(1800.0, gt=0)
    """One optimizer step, one checkpoint or one export."""
