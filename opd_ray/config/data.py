"""The configuration's sections about data: what is read, what is measured on it, and what is logged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from opd_ray.config.binding import NOTHING
from opd_ray.config.method import STRICT

EMBEDDED = "embedded"
"""Value of a path that stands for the small models and data that the package makes itself."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Prompts, golden solutions, held-out problems and the task that verifies answers."""

    task: str = ""
    """Asks the questions and verifies answers: math, chain, reasoning_gym or module:Class (a class of your own); by
    default reasoning_gym where prompts or problems are its, else math."""
    prompts: str = EMBEDDED
    """JSONL or Parquet file with one training prompt per row (prompt, answer, optional id)."""
    golden: str | None = EMBEDDED
    """JSONL or Parquet file of prompts with a complete response each, as text or tokens; null for none;
    embedded:N for another number of the embedded 128."""
    golden_filter: Literal["none", "correct"] = "none"
    """correct: the task's verifier has to agree with each golden response."""
    golden_problems: Literal["refuse", "skip"] = "refuse"
    """Golden rows without EOS, over length, repetitive (rep(o) of metrics.*) or judged wrong: end the run, or leave
    them out and say how many."""
    evaluation: Annotated[str, NOTHING] = EMBEDDED
    """JSONL or Parquet file of held-out problems."""
    shuffle: bool = True
    """Visit prompts and golden rows in a new random order every epoch, not as they lie in their files."""

    def __post_init__(self) -> None:
        if not self.task:
            made_up = any(each.startswith("reasoning_gym:") for each in (self.prompts, self.evaluation))
            object.__setattr__(self, "task", "reasoning_gym" if made_up else "math")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Held-out accuracy of the student, before, during and after."""

    num_problems: int = Field(512, ge=0)
    """Problems before and after, the first of the file; 0 evaluates nothing."""
    every_steps: int = Field(50, ge=0)
    """Evaluate during training every so many steps; 0 for never."""
    num_problems_during: int = Field(128, ge=1)
    """Problems of an evaluation during training."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the sampled answers (the greedy ones have none)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MetricsConfig:
    """What is logged, and what counts as repetitive."""

    repetition_window_chars: int | None = Field(None, ge=1)
    """L of rep(o): the tail of a response that is compressed; by default two characters for each token of the length
    budget, about half of a truncated response, at most the paper's 10 000."""
    repetition_ratio: float | None = Field(None, gt=1)
    """τ of rep(o): repetitive when the tail shrinks by more than this factor; by default the paper's 10 at 10 000
    characters and less for shorter windows, of which zlib saves less."""
    rollout_log_every_steps: int = Field(10, ge=0)
    """Write the rollouts of every n-th step to rollouts/*.parquet; 1 for all, 0 for none."""
    rollout_log_keep: int = Field(1000, ge=1)
    """Files of the rollout log, the newest, that are kept; older ones are deleted."""
