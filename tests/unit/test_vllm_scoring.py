"""What VllmScoringEngine asks of vLLM's V2 runner, which needs CUDA, and what it makes of the answers."""

from __future__ import annotations

import numpy as np
import pytest

from fake_server import VOCAB_SIZE, table
from fake_vllm import FakeVllm, put
from opd_ray.messages import ScoreRequest
from opd_ray.score.engine import Rollout
from opd_ray.score.vllm import VllmScoringEngine

STOPS = (7, 3)


def engine_on(monkeypatch: pytest.MonkeyPatch, fake: FakeVllm) -> VllmScoringEngine:
    put(monkeypatch, fake)
    return VllmScoringEngine(path="somewhere", max_context_tokens=64)


def rollouts() -> list[Rollout]:
    """A prompt of one token, a response of none, sampled stop tokens, given ids of a larger output layer."""
    random = np.random.default_rng(2)
    return [
        Rollout(
            random.integers(0, VOCAB_SIZE, prompt),
            random.integers(0, 9, response).astype(np.int32),
            np.argsort(random.random((response, VOCAB_SIZE + 2)), axis=1)[:, :5].astype(np.int32),
        )
        for prompt, response in ((1, 20), (6, 0), (4, 1), (8, 30))
    ]


def whole(rollout: Rollout, stops: tuple[int, ...]) -> np.ndarray:
    """[T, vocabulary + 2] log-probs with the stop tokens as one."""
    full = table(0)[[rollout.prompt_tokens[-1], *rollout.response_tokens[:-1]][: len(rollout.response_tokens)]]
    full = np.pad(full, ((0, 0), (0, 2)), constant_values=-np.inf)
    if stops:
        together = np.logaddexp.reduce(full[:, list(stops)], axis=1)
        full[:, list(stops)] = -np.inf
        full[:, stops[0]] = together
    return full


@pytest.mark.parametrize("stops", [(), (7,), STOPS])
@pytest.mark.parametrize("top_k", [0, 1, 6])
def test_chosen_tokens_make_every_score_exact(
    monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...], top_k: int
) -> None:
    engine = engine_on(monkeypatch, FakeVllm())
    scored = engine.score(rollouts(), ScoreRequest(top_k, given=True, stop_token_ids=stops))
    for row, scores in zip(rollouts(), scored, strict=True):
        full, tokens = whole(row, stops), row.response_tokens
        own = np.where(np.isin(tokens, stops), stops[0] if stops else -1, tokens)
        np.testing.assert_allclose(scores.logprobs, full[np.arange(len(own)), own], atol=1e-5)
        np.testing.assert_allclose(scores.given_logprobs, np.take_along_axis(full, row.given_ids, 1), atol=1e-5)
        np.testing.assert_allclose(scores.topk_logprobs, np.sort(full, axis=1)[:, ::-1][:, :top_k], atol=1e-5)
        assert scores.topk_ids.shape == (len(tokens), top_k) and scores.topk_ids.dtype == np.int32
        if stops:
            np.testing.assert_allclose(scores.stop_logprobs, full[:, stops[0]], atol=1e-5)


def test_no_alternatives_are_asked_for_where_none_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm()
    engine_on(monkeypatch, fake).score(rollouts(), ScoreRequest(stop_token_ids=STOPS))
    assert [len(tokens) for _, tokens, _ in fake.added] == [21, 5, 38]  # and nothing for the empty response
    assert all(sampling["prompt_logprobs"] is None for _, _, sampling in fake.added)
    assert [sampling["prompt_logprob_start"] for _, _, sampling in fake.added] == [0, 3, 7]
    assert all(sampling["prompt_logprob_token_ids"].shape[1] == 3 for _, _, sampling in fake.added)


def test_without_the_v2_runner_stop_tokens_are_looked_for_among_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(v2=False)
    engine = engine_on(monkeypatch, fake)
    engine.score(rollouts(), ScoreRequest(3, stop_token_ids=STOPS))
    assert [sampling for _, _, sampling in fake.added] == [
        {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 3 + 1 + 16}
    ] * 4
    with pytest.raises(ValueError, match="vLLM scorer gives no log-probs of chosen tokens.*use engine=torch"):
        engine.score(rollouts(), ScoreRequest(given=True))


def test_scores_that_vllm_did_not_give_are_an_error_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops a request that it resumes behind its first row."""
    fake = FakeVllm()
    fake._chosen = lambda rows, sampling: None
    with pytest.raises(RuntimeError, match="gave no log-probs of the chosen tokens of request 1-0"):
        engine_on(monkeypatch, fake).score(rollouts(), ScoreRequest())
