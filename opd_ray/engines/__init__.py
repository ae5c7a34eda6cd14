"""The two engine Protocols: what a generator and a scorer ask of an inference engine.

Engines know tokens. They know nothing of tasks, text, slots, Ray or the driver. An engine
is used from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from opd_ray.errors import InputError
from opd_ray.messages import Finished, GenerationRequest, ScoreRequest, TransferGroup, WeightManifest

Unfinished = Literal["keep", "restart"]


class GenerationEngine(Protocol):
    """Continuous batching of responses, with weights that change while responses are under way."""

    weight_version: int
    """Version of the weights that the next token will be sampled from; 0 at the start."""

    def submit(self, request: GenerationRequest) -> None:
        """Adds a request; it runs from the next step on."""

    def step(self) -> list[Finished]:
        """Advances every running response by about one token and returns those that ended."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops unfinished requests; ``step`` will not return them. Unknown ids are ignored."""

    def connect(self, group: TransferGroup) -> None:
        """Joins the weight-transfer group; blocks until all members joined or the group's timeout.

        Tensor-parallel engines occupy the ranks ``group.rank`` … ``group.rank + tp - 1``.
        Called again, it leaves the former group first.
        """

    def update_weights(self, manifest: WeightManifest, unfinished: Unfinished) -> None:
        """Receives one broadcast and serves the new weights from the next step on.

        "keep": unfinished responses go on; their next tokens equal a recompute of the prefix
        under the new weights (no stale KV cache). "restart": they are begun again from their prompt.
        """


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


class ScoringEngine(Protocol):
    """Log-probs of given tokens under one model, at temperature 1."""

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        """One Scores per sequence, in order. ``top_k`` of the vocabulary size or more returns the whole
        distribution. Raises ValueError for what the engine cannot give (``given`` and ``hidden`` on vLLM)."""

    def load(self, path: str) -> None:
        """Serves another checkpoint of the same architecture from the next call on."""


def response_budget(request: GenerationRequest, max_context_tokens: int) -> int:
    """Tokens the response may take before it ends with "length": its budget, or what is left of the
    context. Raises InputError for a prompt that leaves no room."""
    room = max_context_tokens - len(request.prompt_tokens)
    if room < 1:
        raise InputError(
            f"request {request.request_id}: its prompt has {len(request.prompt_tokens)} tokens, but prompt and "
            f"response share a context of {max_context_tokens}; shorten the prompt or raise student.max_context_tokens"
        )
    return min(request.sampling.max_response_tokens, room)
