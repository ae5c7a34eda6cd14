"""A scoring engine that needs no model, and no torch: drivers that tests kill start it again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_ray.messages import ScoreRequest
from opd_ray.score.engine import Rollout, Scores


class UniformScores:
    """ScoringEngine that finds 32 tokens equally likely."""

    device = "cpu"

    def __init__(self) -> None:
        self.loaded: list[str] = []
        """Every path that ``load`` was called with, in order."""

    def load(self, path: str) -> None:
        self.loaded.append(path)

    def parameters(self) -> dict[str, Any]:
        return {}

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        return [self._score(sequence, request) for sequence in sequences]

    def _score(self, sequence: Rollout, request: ScoreRequest) -> Scores:
        tokens = len(sequence.response_tokens)

        def uniform(*shape: int) -> np.ndarray:
            return np.full(shape, -np.log(32), np.float32)

        return Scores(
            logprobs=uniform(tokens),
            topk_ids=np.tile(np.arange(request.top_k, dtype=np.int32), (tokens, 1)),
            topk_logprobs=uniform(tokens, request.top_k),
            given_logprobs=uniform(*sequence.given_ids.shape) if request.given else uniform(tokens, 0),
            stop_logprobs=uniform(tokens if request.stop_token_ids else 0),
            hidden=np.zeros((tokens, 4 if request.hidden else 0), np.float32),
        )
