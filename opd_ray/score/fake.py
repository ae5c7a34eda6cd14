"""A scoring engine for unit tests: every token is equally likely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_ray.messages import ScoreRequest
from opd_ray.score.engine import Rollout, Scores


class FakeScoringEngine:
    """ScoringEngine of the uniform distribution; equal alternatives come in the order of their ids."""

    def __init__(self, *, vocab_size: int = 32) -> None:
        self.loaded: list[str] = []
        """Every path that ``load`` was called with, in order."""
        self._vocab_size = vocab_size

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        return [self._score(sequence, request) for sequence in sequences]

    def load(self, path: str) -> None:
        self.loaded.append(path)

    def _score(self, sequence: Rollout, request: ScoreRequest) -> Scores:
        stops = request.stop_token_ids
        probabilities = np.full(self._vocab_size, 1 / self._vocab_size)
        probabilities[list(stops[1:])] = 0.0
        probabilities[list(stops[:1])] = len(stops) / self._vocab_size
        with np.errstate(divide="ignore"):
            logprobs = np.log(probabilities).astype(np.float32)
        best = np.argsort(-logprobs, kind="stable")[: len(logprobs) - len(stops[1:])][: request.top_k]
        num_tokens = len(sequence.response_tokens)
        sampled = [stops[0] if token in stops else int(token) for token in sequence.response_tokens]
        given = sequence.given_ids if request.given else None
        return Scores(
            logprobs=logprobs[np.asarray(sampled, dtype=np.int64)],
            topk_ids=np.tile(best.astype(np.int32), (num_tokens, 1)),
            topk_logprobs=np.tile(logprobs[best], (num_tokens, 1)),
            given_logprobs=np.zeros((num_tokens, 0), np.float32) if given is None else logprobs[given],
            stop_logprobs=np.full(num_tokens if stops else 0, logprobs[stops[0]] if stops else 0.0, np.float32),
            hidden=np.zeros((num_tokens, 4 if request.hidden else 0), np.float32),
        )
