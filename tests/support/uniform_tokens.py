"""A generation engine that needs no model: deterministic and instant.

Token t of a response is a function of the request's seed and t, so a test can predict it; its
log-prob is that of a uniform draw. Weight updates only change the version that new tokens carry.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.messages import Finished, FinishReason, GenerationRequest, TransferGroup, WeightManifest
from repeating_tails import repeats

VOCAB_SIZE = 32


class UniformTokens:
    """GenerationEngine that draws uniform tokens, one per response and step."""

    beside_steps = True

    def __init__(self, *, max_num_seqs: int = 64, max_context_tokens: int = 1024) -> None:
        self.weight_version = self.received = 0
        self.connected: list[TransferGroup] = []
        """Every group that ``connect`` was called with, in order."""
        self._max_num_seqs = max_num_seqs
        self._max_context_tokens = max_context_tokens
        self._requests: dict[str, tuple[GenerationRequest, int]] = {}
        self._versions: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}

    def submit(self, request: GenerationRequest) -> None:
        self._requests[request.request_id] = (request, response_budget(request, self._max_context_tokens))
        self._versions[request.request_id], self._tokens[request.request_id] = [], []

    def step(self) -> list[Finished]:
        finished = []
        for request_id in list(self._requests)[: self._max_num_seqs]:
            versions, tokens = self._versions[request_id], self._tokens[request_id]
            versions.append(self.weight_version)
            request, budget = self._requests[request_id]
            tokens.append(self._token(request, len(tokens)))
            if reason := self._reason(request, tokens, budget):
                finished.append(self._finish(request, tokens, versions, reason))
                self.abort([request_id])
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._versions.pop(request_id, None)
            self._tokens.pop(request_id, None)

    def connect(self, group: TransferGroup) -> None:
        self.connected.append(group)

    def receive(self, manifest: WeightManifest) -> None:
        self.received = manifest.version

    def install(self, unfinished: Unfinished) -> None:
        self.weight_version = self.received
        if unfinished == "restart":
            self._versions = {request_id: [] for request_id in self._versions}
            self._tokens = {request_id: [] for request_id in self._tokens}

    def _token(self, request: GenerationRequest, position: int) -> int:
        return random.Random(f"{request.seed}/{position}").randrange(VOCAB_SIZE)

    def _reason(self, request: GenerationRequest, tokens: list[int], budget: int) -> FinishReason | None:
        if tokens[-1] in request.sampling.stop_token_ids:
            return "stop"
        if len(tokens) >= budget:
            return "length"
        rule = request.sampling.repetition_rule
        return "repetition" if rule and repeats(tokens, rule) else None

    def _finish(
        self, request: GenerationRequest, tokens: list[int], versions: list[int], reason: FinishReason
    ) -> Finished:
        top_k = min(request.sampling.top_k, VOCAB_SIZE)
        return Finished(
            request_id=request.request_id,
            tokens=np.asarray(tokens, dtype=np.int32),
            logprobs=np.full(len(tokens), -math.log(VOCAB_SIZE), dtype=np.float32),
            weight_versions=np.asarray(versions, dtype=np.int32),
            finish_reason=reason,
            topk_ids=np.tile(np.arange(top_k, dtype=np.int32), (len(tokens), 1)) if top_k else None,
        )
