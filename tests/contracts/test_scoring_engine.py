"""Every ScoringEngine agrees with a transformers forward pass, and so with the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3ForCausalLM

from engine_host import EngineHost
from opd_ray.config import ScorerConfig
from opd_ray.errors import InputError, RunError
from opd_ray.messages import ScoreRequest
from opd_ray.models.checkpoints import inspect
from opd_ray.run.servers import Look
from opd_ray.score.engine import Rollout, Scores, ScoringEngine
from opd_ray.score.remote import RemoteScoringEngine
from opd_ray.score.replicas import Baseline
from opd_ray.score.server import Key, Server
from opd_ray.score.standing import probe_opinion
from opd_ray.score.torch import TorchScoringEngine
from vllm_servers import VllmServers

VOCAB_SIZE = 32
MAX_CONTEXT_TOKENS = 96
TOLERANCE = 1e-4
TORCH = ["torch", "torch-one-row", "torch-three-tokens-a-chunk"]
MODELS = [*(pytest.param(name, marks=pytest.mark.vllm) for name in ("vllm", "servers")), *TORCH]
STOPS = (7, 3, 20)
"""An EOS set: sampled ones of each id are among the rollouts."""


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny_model: dict[str, Path], vllm_host: EngineHost) -> ScoringEngine:
    path = str(tiny_model["untied"])
    if request.param == "servers":
        return engine_of(request.getfixturevalue("tiny_servers"))
    if request.param == "vllm":
        return vllm_host.build("opd_ray.score.vllm:VllmScoringEngine", path=path, kv_cache_bytes=16 * 2**20)
    sizes = {
        "torch": {},
        "torch-one-row": {"max_batch_tokens": 1},
        "torch-three-tokens-a-chunk": {"logits_bytes": 3 * 4 * VOCAB_SIZE},
    }
    return TorchScoringEngine(path=path, device="cpu", **({"max_batch_tokens": 256} | sizes[request.param]))


def engine_of(servers: VllmServers, deadline_s: float = 60.0) -> RemoteScoringEngine:
    """An engine that asks these servers, whose start is now."""
    there = [Server(url, model="tiny", key=Key("s3cret"), most_at_once=8) for url in servers.urls]
    probe = np.arange(2, 30)
    answers = {each.url: probe_opinion(probe)(each, 10.0) for each in there}
    baseline = Baseline(dict.fromkeys(servers.urls, "tiny"), probe, answers, VOCAB_SIZE, chosen=False, allowed=0.005)
    return RemoteScoringEngine(servers=there, baseline=baseline, most_at_once=8, deadline_s=deadline_s)


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


@pytest.mark.parametrize("engine", MODELS, indirect=True)
@pytest.mark.parametrize("top_k", [0, 4, VOCAB_SIZE, 1000])
def test_shapes_and_dtypes(engine: ScoringEngine, top_k: int) -> None:
    for rollout, scores in zip(rollouts(), engine.score(rollouts(), ScoreRequest(top_k=top_k)), strict=True):
        tokens, k = len(rollout.response_tokens), min(top_k, VOCAB_SIZE)
        assert (scores.logprobs.shape, scores.logprobs.dtype) == ((tokens,), np.float32)
        assert (scores.topk_ids.shape, scores.topk_ids.dtype) == ((tokens, k), np.int32)
        assert (scores.topk_logprobs.shape, scores.topk_logprobs.dtype) == ((tokens, k), np.float32)
        assert scores.given_logprobs.shape == scores.hidden.shape == (tokens, 0)
        assert scores.stop_logprobs.shape == (0,)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
@pytest.mark.parametrize("top_k", [0, 4, VOCAB_SIZE])
def test_shapes_with_an_eos_set(engine: ScoringEngine, top_k: int) -> None:
    """The set is one token, so the whole distribution has two entries fewer."""
    for rollout, scores in zip(
        rollouts(), engine.score(rollouts(), ScoreRequest(top_k, stop_token_ids=STOPS)), strict=True
    ):
        tokens, k = len(rollout.response_tokens), min(top_k, VOCAB_SIZE - 2)
        assert (scores.stop_logprobs.shape, scores.stop_logprobs.dtype) == ((tokens,), np.float32)
        assert (scores.topk_ids.shape, scores.topk_ids.dtype) == ((tokens, k), np.int32)
        assert (scores.topk_logprobs.shape, scores.topk_logprobs.dtype) == ((tokens, k), np.float32)
        assert not np.isin(scores.topk_ids, STOPS[1:]).any()


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_a_sampled_eos_of_any_id_has_the_probability_of_all(engine: ScoringEngine) -> None:
    seen = set()
    for rollout, scores in zip(rollouts(), engine.score(rollouts(), ScoreRequest(stop_token_ids=STOPS)), strict=True):
        sampled = np.isin(rollout.response_tokens, STOPS)
        seen |= set(rollout.response_tokens[sampled].tolist())
        np.testing.assert_array_equal(scores.logprobs[sampled], scores.stop_logprobs[sampled])
    assert seen == set(STOPS)


@pytest.mark.parametrize("engine", MODELS[:1], indirect=True)
def test_steps_of_ever_new_sizes_do_not_take_ever_more_memory(engine: ScoringEngine, vllm_host: EngineHost) -> None:
    """The bug: oneDNN kept a kernel for every number of tokens, so generators grew with the prefixes that each weight
    update made them recompute."""

    def score(totals: range) -> None:
        for total in totals:
            half = (total - 256) // 2
            lengths = [64, 64, 64, 64, half, total - 256 - half]
            engine.score([Rollout(np.full(4, 5), np.full(each - 4, 5, np.int32)) for each in lengths], ScoreRequest())

    score(range(320, 380))  # five kernels each: now there are as many as may be
    before = vllm_host.memory_bytes()
    score(range(380, 440))
    assert vllm_host.memory_bytes() - before < 70 * 2**20


@pytest.mark.parametrize("engine", MODELS, indirect=True)
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


def merged(full: np.ndarray) -> np.ndarray:
    """The distribution in which the first of STOPS stands for all."""
    probabilities = np.exp(full.astype(np.float64))
    together = probabilities[:, STOPS].sum(1)
    probabilities[:, STOPS] = 0.0
    probabilities[:, STOPS[0]] = together
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
@pytest.mark.parametrize("top_k", [VOCAB_SIZE, VOCAB_SIZE - 8])
def test_an_eos_set_is_summed_before_the_alternatives_are_chosen(
    engine: ScoringEngine, expected: list[np.ndarray], top_k: int
) -> None:
    scored = engine.score(rollouts(), ScoreRequest(top_k, stop_token_ids=STOPS))
    for rollout, full, scores in zip(rollouts(), expected, scored, strict=True):
        whole = merged(full)
        best = np.sort(whole, axis=1)[:, ::-1][:, : min(top_k, VOCAB_SIZE - 2)]
        np.testing.assert_allclose(scores.topk_logprobs, best, atol=TOLERANCE)
        np.testing.assert_allclose(np.take_along_axis(whole, scores.topk_ids, 1), best, atol=TOLERANCE)
        np.testing.assert_allclose(scores.stop_logprobs, whole[:, STOPS[0]], atol=TOLERANCE)
        sampled = np.where(np.isin(rollout.response_tokens, STOPS), STOPS[0], rollout.response_tokens)
        np.testing.assert_allclose(scores.logprobs, whole[np.arange(len(sampled)), sampled], atol=TOLERANCE)


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_one_eos_changes_no_distribution(engine: ScoringEngine, expected: list[np.ndarray]) -> None:
    for full, scores in zip(expected, engine.score(rollouts(), ScoreRequest(16, stop_token_ids=(7,))), strict=True):
        np.testing.assert_allclose(scores.topk_logprobs, np.sort(full, axis=1)[:, ::-1][:, :16], atol=TOLERANCE)
        np.testing.assert_allclose(scores.stop_logprobs, full[:, 7], atol=TOLERANCE)


@pytest.mark.vllm
@pytest.mark.parametrize("engine", [pytest.param("vllm")], indirect=True)
def test_an_eos_that_vllm_does_not_name_counts_nothing(engine: ScoringEngine, expected: list[np.ndarray]) -> None:
    """A third of this vocabulary lies beyond the alternatives that are asked for."""
    asked = 16 + len(STOPS) - 1
    for rollout, full, scores in zip(
        rollouts(), expected, engine.score(rollouts(), ScoreRequest(stop_token_ids=STOPS)), strict=True
    ):
        named = np.argsort(np.argsort(-full, axis=1), axis=1) < asked
        named[np.arange(len(full)), rollout.response_tokens] = True
        found = np.where(named, np.exp(full), 0.0)[:, STOPS].sum(1)
        np.testing.assert_allclose(np.exp(scores.stop_logprobs), found, atol=TOLERANCE)


def with_given(num_given: int) -> list[Rollout]:
    random = np.random.default_rng(1)
    rows = rollouts()
    ids = [np.argsort(random.random((len(row.response_tokens), VOCAB_SIZE)), axis=1)[:, :num_given] for row in rows]
    return [replace(row, given_ids=each.astype(np.int32)) for row, each in zip(rows, ids, strict=True)]


@pytest.mark.parametrize("engine", TORCH, indirect=True)
@pytest.mark.parametrize("stops", [(), STOPS])
def test_given_tokens_are_looked_up(engine: ScoringEngine, expected: list[np.ndarray], stops: tuple[int, ...]) -> None:
    rows = with_given(9)
    for row, full, scores in zip(
        rows, expected, engine.score(rows, ScoreRequest(given=True, stop_token_ids=stops)), strict=True
    ):
        whole = merged(full) if stops else full
        expected_logprobs = np.take_along_axis(whole, row.given_ids, 1)
        assert scores.given_logprobs.dtype == np.float32
        np.testing.assert_allclose(scores.given_logprobs, expected_logprobs, atol=TOLERANCE)


def test_given_tokens_of_a_larger_output_layer_have_no_probability(tiny_model: dict[str, Path]) -> None:
    """Models of one family pad their vocabularies to different sizes."""
    engine = TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu")
    row = Rollout(
        np.array([5, 6]), np.array([7, 8], np.int32), np.array([[7, VOCAB_SIZE], [VOCAB_SIZE + 99, 3]], np.int32)
    )
    (scores,) = engine.score([row], ScoreRequest(given=True))
    assert np.isneginf(scores.given_logprobs).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("engine", TORCH, indirect=True)
def test_hidden_states_and_the_output_layer_make_the_distribution(
    engine: ScoringEngine, expected: list[np.ndarray], tiny_model: dict[str, Path]
) -> None:
    head = AutoModelForCausalLM.from_pretrained(tiny_model["untied"], dtype=torch.float32).get_output_embeddings()
    for full, scores in zip(expected, engine.score(rollouts(), ScoreRequest(hidden=True)), strict=True):
        assert scores.hidden.dtype == np.float32
        with torch.inference_mode():
            whole = head(torch.from_numpy(scores.hidden)).log_softmax(-1).numpy()
        np.testing.assert_allclose(whole, full, atol=TOLERANCE)


def test_a_model_that_sees_across_the_sequences_of_a_row_scores_padded_ones(
    expected: list[np.ndarray], tiny_model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an architecture keeps the bounds of sequences from its attention."""
    monkeypatch.setattr("opd_ray.models.attention.row_bounds", lambda *_: {})
    monkeypatch.setattr("opd_ray.score.torch.row_bounds", lambda *_: {})
    engine = TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu")
    for rollout, full, scores in zip(rollouts(), expected, engine.score(rollouts(), ScoreRequest()), strict=True):
        np.testing.assert_allclose(scores.logprobs, own(full, rollout), atol=TOLERANCE)


def test_hidden_states_of_a_bfloat16_model_are_float16_and_keep_their_digits(tiny_model: dict[str, Path]) -> None:
    engine = TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu", dtype="bfloat16")
    scored = engine.score(rollouts(), ScoreRequest(4, hidden=True, stop_token_ids=STOPS))
    assert {scores.hidden.dtype for scores in scored} == {np.dtype(np.float16)}
    for scores in scored:
        states = torch.from_numpy(scores.hidden)
        assert torch.equal(states.bfloat16().half(), states)
    assert {scores.logprobs.dtype for scores in scored} == {np.dtype(np.float32)}


@pytest.mark.vllm
@pytest.mark.parametrize("engine", [pytest.param("vllm")], indirect=True)
@pytest.mark.parametrize(
    ("request_", "what"), [(ScoreRequest(given=True), "chosen tokens"), (ScoreRequest(hidden=True), "hidden")]
)
def test_vllm_says_what_it_cannot_give(engine: ScoringEngine, request_: ScoreRequest, what: str) -> None:
    with pytest.raises(ValueError, match=rf"vLLM scorer gives no .*{what}.*use engine=torch"):
        engine.score(with_given(4), request_)


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=pytest.mark.vllm), "torch"])
@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_another_checkpoint_can_be_loaded(
    kind: str, variant: str, tiny_model: dict[str, Path], vllm_host: EngineHost, tmp_path: Path
) -> None:
    """An output layer tied to the embedding must not stay the former one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model[variant], dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    path = str(tiny_model[variant])
    if kind == "vllm":
        engine = vllm_host.build("opd_ray.score.vllm:VllmScoringEngine", path=path, kv_cache_bytes=16 * 2**20)
    else:
        engine = TorchScoringEngine(path=path, device="cpu")
    engine.load(str(tmp_path))
    for rollout, scores in zip(rollouts(), engine.score(rollouts(), ScoreRequest()), strict=True):
        tokens = torch.tensor(np.concatenate([rollout.prompt_tokens, rollout.response_tokens]))[None]
        with torch.inference_mode():
            full = model(tokens).logits[0, len(rollout.prompt_tokens) - 1 : -1].log_softmax(-1).numpy()
        np.testing.assert_allclose(scores.logprobs, own(full, rollout), atol=TOLERANCE)


def test_logits_that_change_behind_the_output_layer_are_those_of_the_model(tmp_path: Path) -> None:
    """Gemma 2 caps its logits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = TorchScoringEngine(path=str(tmp_path), device="cpu", logits_bytes=3 * 4 * VOCAB_SIZE)
    rows = rollouts()[:2]
    for row, scores in zip(rows, engine.score(rows, ScoreRequest()), strict=True):
        tokens = torch.tensor(np.concatenate([row.prompt_tokens, row.response_tokens]))[None]
        with torch.inference_mode():
            full = model(tokens).logits[0, len(row.prompt_tokens) - 1 : -1].log_softmax(-1).numpy()
        np.testing.assert_allclose(scores.logprobs, own(full, row), atol=TOLERANCE)


def test_logits_that_change_in_an_unknown_way_are_refused(tiny_model: dict[str, Path], monkeypatch) -> None:
    forward = Qwen3ForCausalLM.forward

    def halved(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", halved)
    with pytest.raises(InputError, match="Qwen3ForCausalLM does something unknown to its logits"):
        TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu")


def test_logits_of_a_batch_are_never_all_held(tiny_model: dict[str, Path]) -> None:
    """The output layer sees a chunk of tokens at a time, whatever is asked."""
    engine = TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu", logits_bytes=7 * 4 * VOCAB_SIZE)
    rows: list[int] = []
    engine._head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.numel() // VOCAB_SIZE))
    scored = engine.score(with_given(4), ScoreRequest(top_k=8, given=True, hidden=True, stop_token_ids=STOPS))
    num_tokens = sum(len(scores.logprobs) for scores in scored)
    assert max(rows) == 7
    assert num_tokens <= sum(rows) <= num_tokens + 1


def test_a_token_beyond_the_vocabulary_is_named(tiny_model: dict[str, Path]) -> None:
    engine = TorchScoringEngine(path=str(tiny_model["untied"]), device="cpu")
    with pytest.raises(ValueError, match="token 32 is not among the 32 of Qwen3ForCausalLM"):
        engine.score([Rollout(np.array([5]), np.array([VOCAB_SIZE], np.int32))], ScoreRequest())


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


@pytest.mark.vllm
def test_what_a_run_asks_of_servers_before_it_begins_is_answered(
    tiny_servers: VllmServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, key, context, tokenizer, the tokens that end a response, log-probs, agreement."""
    student = inspect("student.path", tiny_servers.paths[0])
    scorer = ScorerConfig(url=tuple(tiny_servers.urls), url_key_env="SERVERS_KEY")
    monkeypatch.setenv("SERVERS_KEY", "wrong")
    with pytest.raises(InputError, match="answers 401 .* see the key in SERVERS_KEY"):
        Look("teacher", scorer, student, student, [])
    monkeypatch.setenv("SERVERS_KEY", "s3cret")
    look = Look("teacher", scorer, student, student, [np.arange(3, 20), np.arange(5, 31)])
    assert look.facts.eos_token_ids == (1, 2)  # of its generation_config.json, which nobody here has read
    assert look.facts.context_tokens == MAX_CONTEXT_TOKENS
    baseline = look.baseline([ScoreRequest(4, stop_token_ids=(1, 2))], (1, 2))
    assert set(baseline.models.values()) == {"tiny"} and not baseline.chosen and baseline.allowed == 0.005
    with pytest.raises(InputError, match="answers 403 .Scale-out endpoints are disabled.* student_top_k needs"):
        look.baseline([ScoreRequest(4, given=True)], (1, 2))


@pytest.mark.vllm
def test_servers_that_were_swapped_are_out_and_servers_that_are_gone_end_the_wait(
    tiny_servers: VllmServers, tiny_model: dict[str, Path], expected: list[np.ndarray]
) -> None:
    """Two of vLLM's own servers: one gets another model behind its URL, then both are killed."""
    engine, (swapped, other) = engine_of(tiny_servers), tiny_servers.urls
    tiny_servers.swap(0, tiny_model["tied"])
    for rollout, full, scores in zip(rollouts(), expected, engine.score(rollouts(), ScoreRequest()), strict=True):
        np.testing.assert_allclose(scores.logprobs, own(full, rollout), atol=TOLERANCE)
    assert [(state.url, state.state) for state in engine.servers()] == [(swapped, "out"), (other, "in use")]
    assert engine.servers()[0].distance > 0.1
    tiny_servers.swap(0, tiny_model["untied"])
    patient, engine = engine_of(tiny_servers), engine_of(tiny_servers, deadline_s=2.0)
    tiny_servers.stop(0)
    assert len(patient.score(rollouts(), ScoreRequest())) == len(rollouts())
    tiny_servers.stop(1)
    with pytest.raises(RunError, match=f"no scores in time.*{swapped}.*cannot be reached.*{other}.*cannot be reached"):
        engine.score(rollouts(), ScoreRequest())
