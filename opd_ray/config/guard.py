"""The configuration of the guard (:mod:`opd_ray.watch.guard`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_SHARES = ("truncated_token_share", "truncation_rate", "repetition_rate")


def _yaml_off(level: Any) -> Any:
    """YAML reads a bare ``off`` as false."""
    return "off" if level is False else level


@checked_dataclass(frozen=True, kw_only=True, config=_STRICT)
class GuardConfig:
    """What raises an alarm, and how far the guard may go; thresholds of three are (warn, act, roll back). Those of
    shares count from the run's normal level, and are crossed only beyond the error of some hundred rollouts."""

    level: Annotated[Literal["off", "warn", "act", "rollback", "stop"], BeforeValidator(_yaml_off)] = "act"
    """The most the guard may do; each level includes those before it."""
    truncated_token_share: tuple[float, float, float] = (0.1, 0.25, 0.7)
    """Share of the tokens that stand in truncated rollouts; the earliest sign of inflation."""
    truncation_rate: tuple[float, float, float] = (0.1, 0.25, 0.5)
    """Share of rollouts that are truncated."""
    repetition_rate: tuple[float, float, float] = (0.05, 0.15, 0.4)
    """Share of rollouts whose tail is repetitive."""
    entropy: tuple[float, float, float] = (0.02, 0.01, 0.003)
    """Entropy in nats under which a student with vanishing gradient, whom the teacher contradicts, is deterministic."""
    max_golden_per_prompt: float = Field(2.0, ge=0)
    """Limit of golden rollouts for each on-policy prompt; 0 leaves them alone."""
    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks of one run; then it is stopped, where level allows."""

    def __post_init__(self) -> None:
        for name in _SHARES:
            thresholds = getattr(self, name)
            if list(thresholds) != sorted(thresholds) or not 0 <= thresholds[0] <= thresholds[2] < 1:
                raise ValueError(f"{name}: expected 0 ≤ warn ≤ act ≤ roll back < 1, got {thresholds}")
        if list(self.entropy) != sorted(self.entropy, reverse=True) or self.entropy[2] < 0:
            raise ValueError(f"entropy: expected warn ≥ act ≥ roll back ≥ 0, got {self.entropy}")
