"""The Protocol of scoring engines: token ids in, log-probs out.

They know nothing of tasks, text, slots, Ray or the driver. An engine is used from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from opd_ray.messages import ScoreRequest


@dataclass(frozen=True)
class Rollout:
    """Prompt and response of one rollout, as token ids."""

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    given_ids: np.ndarray | None = None
    """[T, k'] int32: tokens to be scored at each of the response's T positions, for ``ScoreRequest.given``."""


@dataclass(frozen=True)
class Scores:
    """A model's opinion on one response of T tokens. Nats, float32; what was not asked for has no columns.

    All of ``ScoreRequest.stop_token_ids`` are one token, the first of them, with the probability of all: that is the
    log-prob of any that was sampled; among alternatives only the first appears; given ones but the first have -inf.
    """

    logprobs: np.ndarray
    """[T] log-prob of each response token."""
    topk_ids: np.ndarray
    """[T, k] int32, most probable first."""
    topk_logprobs: np.ndarray
    """[T, k], under the full softmax (not renormalised on the support)."""
    given_logprobs: np.ndarray
    """[T, k'] of ``Rollout.given_ids``."""
    stop_logprobs: np.ndarray
    """[T] log P(stop), of all stop tokens together; [0] without stop tokens."""
    hidden: np.ndarray
    """[T, H] what the output layer turns into logits; float16 of a bfloat16 model, else float32."""
    spans: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """[T] int32: see SCORE_SCHEMA; no engine's, but of :mod:`opd_ray.score.translation`."""


class ScoringEngine(Protocol):
    """Log-probs of given tokens under one model, at temperature 1."""

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        """One Scores per sequence, in order. ``top_k`` of the vocabulary size or more returns the whole
        distribution. Raises ValueError for what the engine cannot give (``given`` and ``hidden`` on vLLM)."""

    def load(self, path: str) -> None:
        """Serves another checkpoint of the same architecture from the next call on."""
