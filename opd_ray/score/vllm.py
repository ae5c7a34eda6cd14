"""ScoringEngine on vLLM's prompt log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_ray.messages import ScoreRequest
from opd_ray.models.vllm import add, build, context_limit, vocabulary_size
from opd_ray.score.alternatives import chosen_ids, num_alternatives, scores_of
from opd_ray.score.engine import Rollout, Scores


class VllmScoringEngine:
    """Sampled log-probs, alternatives and P(stop).

    On CUDA vLLM's V2 runner also gives the log-probs of chosen tokens: those of the student's top-k and an exact
    P(stop), for which it need not look for alternatives.
    Elsewhere a stop token that is not named counts as probability 0 (:mod:`opd_ray.score.alternatives`).
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
        self._chosen = self._engine.vllm_config.use_v2_model_runner
        """Does it give the log-probs of chosen tokens?"""
        self._num_calls = 0

    def load(self, path: str) -> None:
        self._engine.collective_rpc("opd_load", args=(path,))

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        if request.hidden:
            raise ValueError("a vLLM scorer gives no hidden states; use engine=torch")
        if request.given and not self._chosen:
            raise ValueError(
                "this vLLM scorer gives no log-probs of chosen tokens: that takes vLLM's V2 runner on CUDA "
                "(gpus_per_actor; VLLM_USE_V2_MODEL_RUNNER unset); use engine=torch"
            )
        asked = num_alternatives(request, self._vocab_size, chosen=self._chosen)
        self._num_calls += 1
        scores, positions = [], {}
        for index, sequence in enumerate(sequences):
            scores.append(None)
            if self._chosen and not len(sequence.response_tokens):  # vLLM refuses to score no tokens
                scores[index] = self._scores(sequence, request, asked, None)
                continue
            request_id = f"{self._num_calls}-{index}"
            positions[request_id] = index
            tokens = np.concatenate([sequence.prompt_tokens, sequence.response_tokens])
            wanted = self._wanted(sequence, request, asked)
            add(self._engine, request_id, tokens, temperature=0.0, max_tokens=1, **wanted)
        while positions:
            for output in self._engine.step():
                index = positions.pop(output.request_id)
                scores[index] = self._scores(sequences[index], request, asked, output)
        return scores

    def _wanted(self, sequence: Rollout, request: ScoreRequest, asked: int) -> dict[str, Any]:
        """SamplingParams that ask for the log-probs of one sequence."""
        if not self._chosen:
            return {"prompt_logprobs": asked}
        return {
            "prompt_logprobs": asked or None,
            "prompt_logprob_token_ids": chosen_ids(sequence, request, self._vocab_size),
            # The row of the last prompt token predicts the first one of the response.
            "prompt_logprob_start": len(sequence.prompt_tokens) - 1,
        }

    def _scores(self, sequence: Rollout, request: ScoreRequest, asked: int, output: Any) -> Scores:
        """From vLLM's RequestOutput; None for a response of no tokens."""
        num_tokens, chosen = len(sequence.response_tokens), None
        logprobs, ids = np.zeros((num_tokens, 1 + asked), np.float32), np.zeros((num_tokens, 1 + asked), np.int32)
        if output is None:
            chosen = np.zeros(chosen_ids(sequence, request, self._vocab_size).shape, np.float32)
        elif self._chosen:
            chosen = output.prompt_token_id_logprobs
            if chosen is None:
                raise RuntimeError(f"vLLM gave no log-probs of the chosen tokens of request {output.request_id}")
        if output is not None and (asked or not self._chosen):
            logprobs, ids = output.prompt_logprobs.last(num_tokens)
        return scores_of(sequence, request, self._vocab_size, logprobs, ids, chosen)
