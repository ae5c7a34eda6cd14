"""The engine on servers elsewhere: its scores, what it makes of every failure, and how drift is found out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import httpx
import numpy as np
import pytest

from fake_server import VOCAB_SIZE, FakeServer, table
from opd_ray.errors import RunError, ServerRefused
from opd_ray.messages import ScoreRequest
from opd_ray.score import replicas as servers
from opd_ray.score.engine import Rollout
from opd_ray.score.remote import RemoteScoringEngine
from opd_ray.score.replicas import Baseline
from opd_ray.score.server import Key, Server
from opd_ray.score.standing import probe_opinion

PROBE = np.arange(3, 20)
ALLOWED = 0.01


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_FIRST_REST_S", 0.002)
    monkeypatch.setattr(servers, "_LONGEST_REST_S", 0.01)


def fakes(number: int = 2, **options: int) -> list[FakeServer]:
    return [FakeServer(f"http://{name}:8000", **options) for name in ("one", "two", "three")[:number]]


def engine_on(here: Sequence[FakeServer], deadline_s: float = 20.0, key: Key | None = None) -> RemoteScoringEngine:
    there = [Server(each.url, model=each.name, key=key, transport=each.transport) for each in here]
    answers = {each.url: probe_opinion(PROBE)(each, 1.0) for each in there}
    models = {each.url: each.name for each in here}
    baseline = Baseline(models, PROBE, answers, VOCAB_SIZE, all(each.chooses for each in here), ALLOWED)
    for each in here:
        each.asked.clear()
    return RemoteScoringEngine(servers=there, baseline=baseline, most_at_once=4, deadline_s=deadline_s)


def rollouts(number: int = 6, given: int = 0) -> list[Rollout]:
    random = np.random.default_rng(1)
    shapes = [(4, 1 + 3 * index) for index in range(number)]
    return [
        Rollout(
            random.integers(0, VOCAB_SIZE, prompt),
            random.integers(0, VOCAB_SIZE, length).astype(np.int32),
            np.argsort(random.random((length, VOCAB_SIZE + 2)), axis=1)[:, :given].astype(np.int32),
        )
        for prompt, length in shapes
    ]


def own(rollout: Rollout, model: int = 0) -> np.ndarray:
    """Log-probs of a response under the fake's model."""
    before = [rollout.prompt_tokens[-1], *rollout.response_tokens[:-1]]
    return table(model)[before, rollout.response_tokens]


def states(engine: RemoteScoringEngine) -> dict[str, str]:
    return {state.url: state.state for state in engine.servers()}


def assert_right(engine: RemoteScoringEngine, rows: Sequence[Rollout]) -> None:
    for row, scores in zip(rows, engine.score(rows, ScoreRequest()), strict=True):
        np.testing.assert_allclose(scores.logprobs, own(row), atol=1e-5)


def test_every_server_gets_a_share() -> None:
    both = fakes()
    assert_right(engine_on(both), rollouts())
    assert all(each.scored() for each in both)


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("request_", [ScoreRequest(), ScoreRequest(5), ScoreRequest(8, stop_token_ids=(7, 3))])
def test_scores_are_those_of_the_model(chooses: bool, request_: ScoreRequest) -> None:
    both = fakes()
    for each in both:
        each.chooses = chooses
    for row, scores in zip(rollouts(), engine_on(both).score(rollouts(), request_), strict=True):
        whole = table(0)[[row.prompt_tokens[-1], *row.response_tokens[:-1]]]
        if stops := list(request_.stop_token_ids):
            together = np.logaddexp.reduce(whole[:, stops], axis=1)
            whole[:, stops[1:]], whole[:, stops[0]] = -np.inf, together
            np.testing.assert_allclose(scores.stop_logprobs, together, atol=1e-5)
        best = np.sort(whole, axis=1)[:, ::-1][:, : request_.top_k]
        np.testing.assert_allclose(scores.topk_logprobs, best, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(whole, scores.topk_ids, 1), best, atol=1e-5)


def test_given_tokens_come_from_servers_that_can_choose() -> None:
    (one,) = fakes(1)
    with pytest.raises(ValueError, match="give no log-probs of chosen tokens"):
        engine_on([one]).score(rollouts(given=4), ScoreRequest(given=True))
    one.chooses = True
    rows, request = rollouts(given=4), ScoreRequest(given=True, stop_token_ids=(7, 3))
    for row, scores in zip(rows, engine_on([one]).score(rows, request), strict=True):
        whole = table(0)[[row.prompt_tokens[-1], *row.response_tokens[:-1]]]
        whole = np.pad(whole, ((0, 0), (0, 2)), constant_values=-np.inf)  # two of a larger output layer
        whole[:, 7], whole[:, 3] = np.logaddexp(whole[:, 7], whole[:, 3]), -np.inf
        np.testing.assert_allclose(scores.given_logprobs, np.take_along_axis(whole, row.given_ids, 1), atol=1e-5)


def test_an_empty_response_is_not_asked_about() -> None:
    (one,) = fakes(1)
    engine = engine_on([one])
    (scores,) = engine.score([Rollout(np.array([3]), np.array([], np.int32))], ScoreRequest(3, stop_token_ids=(1, 2)))
    assert scores.topk_ids.shape == (0, 3) and scores.stop_logprobs.shape == (0,)
    assert one.asked == []


# ---- failures ----


@pytest.mark.parametrize(
    "failure",
    [
        (503, {"error": {"message": "overloaded"}}),
        (500, b"Internal Server Error"),
        (429, {"detail": "slow down"}),
        (401, {"error": "Unauthorized"}),
        (200, b"<html>a proxy's page</html>"),
        (200, {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}]}),
        (200, {"choices": []}),
        (200, {"choices": [{"prompt_logprobs": None}]}),
        httpx.ConnectError("[Errno 111] Connection refused"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
    ],
)
def test_what_one_server_cannot_the_other_does(failure: tuple[int, object] | httpx.TransportError) -> None:
    one, two = fakes()
    engine = engine_on([one, two])

    def fail(path: str) -> tuple[int, object]:
        if isinstance(failure, httpx.TransportError):
            raise failure
        return failure

    one.fail = fail
    assert_right(engine, rollouts())
    assert states(engine)[two.url] == "in use"
    one.fail = lambda path: None
    while one.url not in {state.url for state in engine.servers() if state.state == "in use"}:
        assert_right(engine, rollouts())  # it is tried again
    assert states(engine) == {one.url: "in use", two.url: "in use"}


def test_a_server_that_failed_is_left_alone_for_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_REST_S", "_LONGEST_REST_S"):
        monkeypatch.setattr(servers, name, 100.0)
    one, two = fakes()
    engine = engine_on([one, two])
    one.fail = lambda path: (503, {})
    for _ in range(4):
        assert_right(engine, rollouts())
    assert 1 <= len(one.scored()) <= 4  # what was under way at once when it failed, and nothing since


def test_a_request_that_every_server_refuses_ends_the_run_with_its_words() -> None:
    both = fakes()
    for each in both:
        each.max_model_len = 20
    with pytest.raises(ServerRefused, match="maximum context length is 20"):
        engine_on(both).score(rollouts(8), ScoreRequest())


def test_no_server_left_ends_by_the_deadline_and_names_them() -> None:
    both = fakes()
    engine = engine_on(both, deadline_s=0.2)
    for each in both:
        each.fail = lambda path: (503, {"error": {"message": "shutting down"}})
    began = time.monotonic()
    with pytest.raises(RunError, match=r"no scores in time.*one:8000.*shutting down.*two:8000.*shutting down"):
        engine.score(rollouts(), ScoreRequest())
    assert time.monotonic() - began < 2
    assert set(states(engine).values()) == {"resting"}


def test_a_probe_that_never_passes_does_not_go_on_for_ever() -> None:
    (one,) = fakes(1)
    engine = engine_on([one], deadline_s=0.2)
    one.fail = lambda path: (503, {}) if one.asked[-1][1].get("prompt") == PROBE.tolist() else None
    with pytest.raises(RunError, match="no scores in time"):
        engine.score(rollouts(), ScoreRequest())


# ---- the standing check ----


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_server_with_another_model_is_out_and_nothing_of_it_counts(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what it had scored in the call before it was found out."""
    there = fakes(number)
    engine = engine_on(there)
    assert_right(engine, rollouts())
    there[0].table = table(5)
    if number == 1:
        with pytest.raises(RunError, match="no server is what it was.*one:8000 answers as another model"):
            engine.score(rollouts(), ScoreRequest())
        return
    with caplog.at_level(logging.WARNING):
        assert_right(engine, rollouts())
    assert states(engine)["http://one:8000"] == "out"
    assert "http://one:8000 answers as another model" in caplog.text and "0.01 are allowed" in caplog.text
    there[0].table, asked = table(0), len(there[0].asked)
    assert_right(engine, rollouts())
    assert len(there[0].asked) == asked  # out for good


def test_noise_is_no_drift() -> None:
    one, two = fakes()
    engine = engine_on([one, two])
    one.table = table(0, noise=0.005)
    for _ in range(5):
        engine.score(rollouts(), ScoreRequest())
    assert set(states(engine).values()) == {"in use"}
    assert 0 < max(state.distance for state in engine.servers()) < ALLOWED


def drift_behind_the_probe(fake: FakeServer) -> None:
    """Its model differs only where the probe does not look: the last four tokens."""
    fake.table = fake.table.copy()
    fake.table[20:] = table(5)[20:]


def test_what_the_probe_does_not_see_a_third_server_settles() -> None:
    there = fakes(3)
    engine = engine_on(there)
    drift_behind_the_probe(there[1])
    for _ in range(12):
        engine.score(rollouts(), ScoreRequest())
    assert states(engine) == {"http://one:8000": "in use", "http://two:8000": "out", "http://three:8000": "in use"}


def test_of_two_servers_that_differ_unseen_by_the_probe_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    there = fakes(2)
    engine = engine_on(there)
    drift_behind_the_probe(there[1])
    for _ in range(6):
        engine.score(rollouts(), ScoreRequest())
    assert set(states(engine).values()) == {"in use"}
    assert any("nobody says which is right" in state.why for state in engine.servers())


def test_every_call_is_checked_at_a_second_server() -> None:
    both = fakes()
    engine = engine_on(both)
    for _ in range(4):
        for each in both:
            each.asked.clear()
        engine.score(rollouts(), ScoreRequest())
        every = [tuple(tokens) for each in both for tokens in each.scored()]
        assert sum(every.count(tokens) == 2 for tokens in set(every)) == 2  # the probe and one sequence


# ---- the key ----


def test_the_key_opens_and_does_not_show() -> None:
    (one,) = fakes(1, key="s3cret")
    key = Key("s3cret")
    assert_right(engine_on([one], key=key), rollouts())
    assert "s3cret" not in repr(key) and "s3cret" not in str(key)
    with pytest.raises(RunError) as caught:
        engine_on([one], key=Key("wr0ng"))
    assert "wr0ng" not in str(caught.value) and "401" in str(caught.value)
