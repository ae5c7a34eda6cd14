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
from opd_ray.messages import Finished, GenerationRequest, TransferGroup, WeightManifest

Unfinished = Literal["keep", "restart"]


class GenerationEngine(Protocol):
    """Continuous batching of responses, with weights that change while responses are under way."""

    weight_version: int
    """Version of the weights that the next token will be sampled from; 0 at the start."""

    def submit(self, request: GenerationRequest) -> None:
        """Adds a request; it runs from the next step on."""

    def step(self) -> list[Finished]:
        """Advances every running response by about one token and returns those that ended."""

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


@dataclass(frozen=True)
class Scores:
    """A model's opinion on one response of T tokens. Nats, float32."""

    logprobs: np.ndarray
    """[T] log-prob of each response token."""
    topk_ids: np.ndarray
    """[T, k] int32, most probable first."""
    topk_logprobs: np.ndarray
    """[T, k], under the full softmax (not renormalised on the support)."""


class ScoringEngine(Protocol):
    """Log-probs of given tokens under a frozen model, at temperature 1."""

    def score(self, sequences: Sequence[Rollout], top_k: int) -> list[Scores]:
        """One Scores per sequence, in order. ``top_k`` 0 returns no alternatives; ``top_k`` of
        the vocabulary size or more returns the whole distribution."""


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
