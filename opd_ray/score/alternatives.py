"""Scores from what vLLM says of a token: its own log-prob, the most probable alternatives, perhaps chosen tokens.

Where it gives no log-probs of chosen tokens, P(stop) is a lower bound: a stop token that is neither among the
alternatives that are asked for nor sampled counts as probability 0.
"""

from __future__ import annotations

import numpy as np

from opd_ray.messages import ScoreRequest
from opd_ray.score.engine import Rollout, Scores

_MORE_ALTERNATIVES = 16
"""Asked for beyond the top-k when there are stop tokens to be found among them."""


def num_alternatives(request: ScoreRequest, vocab_size: int, *, chosen: bool = False) -> int:
    """How many to ask for at each position; ``chosen``: log-probs of the stop tokens come in another way."""
    others = len(request.stop_token_ids[1:])  # may all be among the most probable, and count as one
    if chosen:
        return min(request.top_k + others, vocab_size) if request.top_k else 0
    more = others + _MORE_ALTERNATIVES if request.stop_token_ids else 0
    return min(request.top_k + more, vocab_size)


def chosen_ids(sequence: Rollout, request: ScoreRequest, vocab_size: int) -> np.ndarray:
    """[T, 1 + stops + k'] int32: each response token, the stop tokens and the given ones.

    -1, which vLLM scores as -inf, for ids beyond the vocabulary: padding of a larger output layer.
    """
    num_tokens = len(sequence.response_tokens)
    stops = np.tile(np.asarray(request.stop_token_ids, np.int32), (num_tokens, 1))
    given = sequence.given_ids if request.given else np.empty((num_tokens, 0), np.int32)
    ids = np.concatenate([np.asarray(sequence.response_tokens)[:, None], stops, given], axis=1)
    return np.where(ids < vocab_size, ids, -1).astype(np.int32)


def scores_of(
    sequence: Rollout,
    request: ScoreRequest,
    vocab_size: int,
    logprobs: np.ndarray,
    ids: np.ndarray,
    chosen: np.ndarray | None = None,
) -> Scores:
    """Scores of T tokens from [T, 1 + alternatives] log-probs and ids, each row's own token first; ``chosen``
    [T, 1 + stops + k'] are the log-probs of ``chosen_ids``."""
    stops, given_ids = request.stop_token_ids, sequence.given_ids if request.given else None
    num_tokens = len(sequence.response_tokens)
    alternatives, alternative_ids = logprobs[:, 1:], ids[:, 1:]
    stop_logprobs, given = np.zeros(0, np.float32), np.zeros((num_tokens, 0), np.float32)
    if chosen is None:
        own = logprobs[:, 0]
        each = [np.where(ids == stop, logprobs, -np.inf).max(1, initial=-np.inf) for stop in stops]
    else:
        own, given = chosen[:, 0], chosen[:, 1 + len(stops) :]
        each = list(chosen[:, 1 : 1 + len(stops)].T)
    if stops:
        stop_logprobs = np.logaddexp.reduce(each, axis=0).astype(np.float32)
        own = np.where(np.isin(sequence.response_tokens, stops), stop_logprobs, own)
        # All of them give way to one more column, which is then sorted in.
        others = np.where(np.isin(alternative_ids, stops), -np.inf, alternatives)
        alternatives = np.concatenate([others, stop_logprobs[:, None]], axis=1)
        first = np.full((num_tokens, 1), stops[0], np.int32)
        alternative_ids = np.concatenate([alternative_ids, first], axis=1)
        if given_ids is not None:
            given = np.where(given_ids == stops[0], stop_logprobs[:, None], given)
            given = np.where(np.isin(given_ids, stops[1:]), -np.inf, given)
    top_k = min(request.top_k, vocab_size - len(stops[1:]))
    best = np.argsort(-alternatives, axis=1, kind="stable")[:, :top_k]
    return Scores(
        logprobs=own.astype(np.float32),
        topk_ids=np.take_along_axis(alternative_ids, best, 1),
        topk_logprobs=np.take_along_axis(alternatives, best, 1).astype(np.float32),
        given_logprobs=given.astype(np.float32),
        stop_logprobs=stop_logprobs,
        hidden=np.zeros((num_tokens, 0), np.float32),
    )
