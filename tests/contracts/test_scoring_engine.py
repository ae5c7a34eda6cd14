"""Every ScoringEngine agrees with a transformers forward pass, and so with the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_host import EngineHost
from opd_ray.engines import Rollout, Scores, ScoringEngine
from opd_ray.engines.fake import FakeScoringEngine
from opd_ray.engines.torch_scoring import TorchScoringEngine
from opd_ray.messages import ScoreRequest

VOCAB_SIZE = 32
MAX_CONTEXT_TOKENS = 96
TOLERANCE = 1e-4
MODELS = [pytest.param("vllm", marks=pytest.mark.vllm), "torch", "torch-one-row"]
ANY = [*MODELS, "fake"]


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny_model: dict[str, Path], vllm_host: EngineHost) -> ScoringEngine:
    path = str(tiny_model["untied"])
    if request.param == "fake":
        return FakeScoringEngine(vocab_size=VOCAB_SIZE)
    if request.param == "vllm":
        return vllm_host.build("opd_ray.engines.vllm_scoring:VllmScoringEngine", path=path, kv_cache_bytes=16 * 2**20)
    max_batch_tokens = 1 if request.param == "torch-one-row" else 256
    return TorchScoringEngine(path=path, device="cpu", max_batch_tokens=max_batch_tokens)


def rollouts() -> list[Rollout]:
    """Mixed lengths: a one-token prompt, a one-token response, an empty response, a full context."""
    random = np.random.default_rng(0)
    shapes = [(5, 20), (1, 7), (30, 1), (12, 40), (3, 3), (40, MAX_CONTEXT_TOKENS - 40), (8, 0), (2, 60)]
    return [
        Rollout(random.integers(2, VOCAB_SIZE, prompt), random.integers(1, VOCAB_SIZE, response).astype(np.int32))
        for prompt, response in shapes
    ]


@pytest.fixture(scope="module")
def expected(tiny_model: dict[str, Path]) -> list[np.ndarray]:
    """[T, vocabulary] log-probs of each rollout, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model["untied"], dtype=torch.float32).eval()
    full = []
    for rollout in rollouts():
        tokens = torch.tensor(np.concatenate([rollout.prompt_tokens, rollout.response_tokens]))[None]
        with torch.inference_mode():
            logits = model(tokens).logits[0, len(rollout.prompt_tokens) - 1 : -1]
        full.append(logits.log_softmax(-1).numpy())
    return full


def own(full: np.ndarray, rollout: Rollout) -> np.ndarray:
    return full[np.arange(len(rollout.response_tokens)), rollout.response_tokens]


@pytest.mark.parametrize("engine", ANY, indirect=True)
@pytest.mark.parametrize("top_k", [0, 4, VOCAB_SIZE, 1000])
def test_shapes_and_dtypes(engine: ScoringEngine, top_k: int) -> None:
    for rollout, scores in zip(rollouts(), engine.score(rollouts(), ScoreRequest(top_k=top_k)), strict=True):
        tokens, k = len(rollout.response_tokens), min(top_k, VOCAB_SIZE)
        assert (scores.logprobs.shape, scores.logprobs.dtype) == ((tokens,), np.float32)
        assert (scores.topk_ids.shape, scores.topk_ids.dtype) == ((tokens, k), np.int32)
        assert (scores.topk_logprobs.shape, scores.topk_logprobs.dtype) == ((tokens, k), np.float32)


@pytest.mark.parametrize("engine", ANY, indirect=True)
def test_no_sequences_give_no_scores(engine: ScoringEngine) -> None:
    assert engine.score([], ScoreRequest(top_k=4)) == []


@pytest.mark.parametrize("engine", MODELS, indirect=True)
@pytest.mark.parametrize("top_k", [0, 4])
def test_own_logprobs_equal_a_forward_pass(engine: ScoringEngine, expected: list[np.ndarray], top_k: int) -> None:
    for rollout, full, scores in zip(
        rollouts(), expected, engine.score(rollouts(), ScoreRequest(top_k=top_k)), strict=True
    ):
        np.testing.assert_allclose(scores.logprobs, own(full, rollout), atol=TOLERANCE)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_alternatives_are_the_most_probable_first(engine: ScoringEngine, expected: list[np.ndarray]) -> None:
    for full, scores in zip(expected, engine.score(rollouts(), ScoreRequest(top_k=4)), strict=True):
        best = np.sort(full, axis=1)[:, ::-1][:, :4]
        np.testing.assert_allclose(scores.topk_logprobs, best, atol=TOLERANCE)
        np.testing.assert_allclose(np.take_along_axis(full, scores.topk_ids, 1), best, atol=TOLERANCE)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_the_whole_vocabulary_is_the_whole_distribution(engine: ScoringEngine, expected: list[np.ndarray]) -> None:
    for full, scores in zip(expected, engine.score(rollouts(), ScoreRequest(top_k=VOCAB_SIZE)), strict=True):
        _assert_whole(full, scores)


def _assert_whole(full: np.ndarray, scores: Scores) -> None:
    assert np.array_equal(np.sort(scores.topk_ids, axis=1), np.tile(np.arange(VOCAB_SIZE), (len(full), 1)))
    np.testing.assert_allclose(scores.topk_logprobs, np.take_along_axis(full, scores.topk_ids, 1), atol=TOLERANCE)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_a_sequence_scores_the_same_alone(engine: ScoringEngine) -> None:
    """Padding of a neighbour must not leak into a row."""
    together = engine.score(rollouts(), ScoreRequest(top_k=4))
    for rollout, among in zip(rollouts(), together, strict=True):
        (alone,) = engine.score([rollout], ScoreRequest(top_k=4))
        np.testing.assert_allclose(among.logprobs, alone.logprobs, atol=TOLERANCE)
