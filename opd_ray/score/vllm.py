"""ScoringEngine on vLLM's prompt log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_ray.messages import ScoreRequest
from opd_ray.models.vllm import add, build, columns, context_limit, vocabulary_size
from opd_ray.score.engine import Rollout, Scores

_MORE_ALTERNATIVES = 16
"""Alternatives asked for beyond the top-k when there are stop tokens to be found among them."""


class VllmScoringEngine:
    """Sampled log-probs, alternatives and P(stop).

    vLLM names probabilities only of a position's own token and of its alternatives: a stop token that is neither
    among the k + 16 most probable ones nor sampled counts as probability 0.
    """

    def __init__(self, *, path: str, max_context_tokens: int | None = None, **engine: Any) -> None:
        """As for VllmGenerationEngine."""
        self._engine = build(
            path,
            # vLLM insists on sampling one token, which is never fed back; a sequence of exactly
            # the checkpoint's length needs this room for it.
            max_model_len=context_limit(path, max_context_tokens) + 1,
            enable_prefix_caching=False,
            **engine,
        )
        self._vocab_size = vocabulary_size(self._engine)
        self._num_calls = 0

    def load(self, path: str) -> None:
        self._engine.collective_rpc("opd_load", args=(path,))

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        if request.given or request.hidden:
            what = "hidden states" if request.hidden else "log-probs of chosen tokens"
            raise ValueError(f"a vLLM scorer gives no {what}; use engine=torch")
        stops = request.stop_token_ids
        asked = request.top_k + (len(stops) - 1 + _MORE_ALTERNATIVES if stops else 0)
        asked = min(asked, self._vocab_size)
        self._num_calls += 1
        positions = {}
        for index, sequence in enumerate(sequences):
            tokens = [*sequence.prompt_tokens, *sequence.response_tokens]
            request_id = f"{self._num_calls}-{index}"
            positions[request_id] = index
            add(self._engine, request_id, tokens, temperature=0.0, max_tokens=1, prompt_logprobs=asked)
        scores: list[Any] = [None] * len(sequences)
        while positions:
            for output in self._engine.step():
                index = positions.pop(output.request_id)
                found = columns(output.prompt_logprobs, len(sequences[index].response_tokens), asked)
                scores[index] = _scores(*found, request, self._vocab_size)
        return scores


def _scores(logprobs: np.ndarray, ids: np.ndarray, request: ScoreRequest, vocab_size: int) -> Scores:
    """Scores of T tokens from [T, 1 + alternatives] log-probs and ids, each row's own token first."""
    stops = request.stop_token_ids
    own, top_k = logprobs[:, 0], min(request.top_k, vocab_size - len(stops[1:]))
    stop_logprobs = np.zeros(0, np.float32)
    if stops:
        each = [np.where(ids == stop, logprobs, -np.inf).max(1, initial=-np.inf) for stop in stops]
        stop_logprobs = np.logaddexp.reduce(each, axis=0).astype(np.float32)
        own = np.where(np.isin(ids[:, 0], stops), stop_logprobs, own)
        # All of them give way to one more column, which is then sorted in.
        others = np.where(np.isin(ids, stops), -np.inf, logprobs)
        logprobs = np.concatenate([others, stop_logprobs[:, None]], axis=1)
        ids = np.concatenate([ids, np.full((len(ids), 1), stops[0], np.int32)], axis=1)
    alternatives, alternative_ids = logprobs[:, 1:], ids[:, 1:]
    best = np.argsort(-alternatives, axis=1, kind="stable")[:, :top_k]
    return Scores(
        logprobs=own.astype(np.float32),
        topk_ids=np.take_along_axis(alternative_ids, best, 1),
        topk_logprobs=np.take_along_axis(alternatives, best, 1).astype(np.float32),
        given_logprobs=np.zeros((len(own), 0), np.float32),
        stop_logprobs=stop_logprobs,
        hidden=np.zeros((len(own), 0), np.float32),
    )
