"""Every GenerationEngine: sampling, continuous batching, and weights that change under way.

The mechanics hold for all engines. Agreement with a transformers forward pass is asked of those
that have a model, on tied and untied embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine_host import EngineHost
from opd_ray.config import LoraConfig
from opd_ray.errors import InputError, WeightSyncError
from opd_ray.generate.engine import GenerationEngine
from opd_ray.generate.torch import TorchGenerationEngine
from opd_ray.learn.adapters import Adapters
from opd_ray.learn.export import with_adapters
from opd_ray.messages import (
    Finished,
    GenerationRequest,
    RepetitionRule,
    SamplingSettings,
    TransferGroup,
    WeightManifest,
)
from opd_ray.models.adapters import adapted_layers
from opd_ray.rooms.node import free_port
from opd_ray.weights.manifest import manifest_of, weights_of
from opd_ray.weights.transfer import WeightTransfer
from repeating_tails import first_repeat
from uniform_tokens import UniformTokens

VOCAB_SIZE = 32
MAX_NUM_SEQS = 8
MAX_CONTEXT_TOKENS = 96
SAMPLED = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=24, stop_token_ids=())
GREEDY = replace(SAMPLED, temperature=0.0)
WITH_EOS = replace(SAMPLED, max_response_tokens=64, stop_token_ids=(1, 2, 3))
PROMPTS = [(5, 6, 7), (9, 4, 11, 30, 8), (12,), (20, 21, 22, 23, 24, 25, 26)]
TOLERANCE = 1e-3
MODELS = [
    pytest.param(("vllm", "untied"), marks=pytest.mark.vllm, id="vllm-untied"),
    pytest.param(("vllm", "tied"), marks=pytest.mark.vllm, id="vllm-tied"),
    pytest.param(("torch", "untied"), id="torch-untied"),
    pytest.param(("torch", "tied"), id="torch-tied"),
    pytest.param(("torch, any model", "untied"), id="torch-any-model"),
]
ANY = [*MODELS, pytest.param(("fake", "none"), id="fake")]


class SenderDied(Exception):
    """The sender's end, in the middle of a broadcast."""


@dataclass
class Subject:
    """An engine and, unless it is a fake, the transformers model it started from."""

    engine: GenerationEngine
    model: PreTrainedModel | None
    transfer: WeightTransfer = field(default_factory=WeightTransfer)

    def connect(self, bucket_bytes: int = 2**14) -> None:
        port = free_port()
        group = TransferGroup(
            "gloo", "127.0.0.1", port, 0, 2, timeout_s=20.0, bucket_bytes=bucket_bytes, secret="5ec2e7"
        )
        if self.model is None:
            self.engine.connect(group)
            return
        with ThreadPoolExecutor(1) as thread:
            joined = thread.submit(self.engine.connect, replace(group, rank=1))
            self.transfer.connect(group)
            joined.result()

    def update(
        self, model: PreTrainedModel | None, version: int, unfinished: str = "keep", cut: int | None = None
    ) -> None:
        """With ``cut`` the sender dies when it has sent so many parameters."""
        if model is None:
            self.engine.receive(WeightManifest(version, (), (), ()))
            self.engine.install(unfinished)
            return
        weights = weights_of(model)
        self._send(weights, manifest_of(weights, version), unfinished, cut)

    def update_adapters(self, adapters: Adapters, version: int, cut: int | None = None) -> None:
        """Sends nothing but the adapters of the checkpoint that the engine began with."""
        manifest = manifest_of(adapters.weights(), version)
        manifest = replace(manifest, base=self.model.name_or_path, scale=adapters.lora.scale)
        self._send(adapters.weights(), manifest, "keep", cut)

    def _send(
        self,
        weights: list[tuple[str, torch.Tensor]],
        manifest: WeightManifest,
        unfinished: str = "keep",
        cut: int | None = None,
    ) -> None:
        with ThreadPoolExecutor(1) as thread:
            received = thread.submit(self.engine.receive, manifest)
            if cut is None:
                self.transfer.send(manifest, weights)
            else:
                with pytest.raises(SenderDied):
                    self.transfer.send(manifest, _dying_after(weights[:cut]))
                self.transfer.close()
            received.result()
        self.engine.install(unfinished)

    def update_beside(
        self, model: PreTrainedModel, version: int, requests: Sequence[GenerationRequest]
    ) -> list[Finished]:
        """An update in the midst of which these requests are answered."""
        weights, answers = weights_of(model), []
        manifest = manifest_of(weights, version)

        def paused() -> Iterator[tuple[str, torch.Tensor]]:
            yield from weights[:3]
            answers.extend(self.run(requests))
            yield from weights[3:]

        with ThreadPoolExecutor(1) as thread:
            received = thread.submit(self.engine.receive, manifest)
            self.transfer.send(manifest, paused())
            received.result()
        self.engine.install("keep")
        return answers

    def finish(self, count: int) -> dict[str, Finished]:
        """Steps until ``count`` responses ended."""
        finished: dict[str, Finished] = {}
        for _ in range(2000):
            finished |= {each.request_id: each for each in self.engine.step()}
            if len(finished) == count:
                return finished
        raise AssertionError(f"{len(finished)} of {count} responses ended in 2000 steps")

    def run(self, requests: Sequence[GenerationRequest]) -> list[Finished]:
        for request in requests:
            self.engine.submit(request)
        finished = self.finish(len(requests))
        return [finished[request.request_id] for request in requests]


def _dying_after(weights: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from weights
    raise SenderDied


def _build(kind: str, path: Path | None, host: EngineHost) -> GenerationEngine:
    if kind == "fake":
        return UniformTokens(max_num_seqs=MAX_NUM_SEQS, max_context_tokens=MAX_CONTEXT_TOKENS)
    if kind == "torch":
        return TorchGenerationEngine(path=str(path), device="cpu", max_num_seqs=MAX_NUM_SEQS)
    if kind == "torch, any model":  # by transformers' forward pass, as architectures that have none of ours
        with mock.patch("opd_ray.generate.torch.is_plain", return_value=False):
            return TorchGenerationEngine(path=str(path), device="cpu", max_num_seqs=MAX_NUM_SEQS)
    return host.build(
        "opd_ray.generate.vllm:VllmGenerationEngine",
        path=str(path),
        max_num_seqs=MAX_NUM_SEQS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        kv_cache_bytes=16 * 2**20,
        max_batch_tokens=MAX_CONTEXT_TOKENS,  # so that a recompute of all running responses takes several steps
    )


_SUBJECTS: dict[tuple[str, str], Subject] = {}


@pytest.fixture
def subject(request: pytest.FixtureRequest, tiny_model: dict[str, Path], vllm_host: EngineHost) -> Iterator[Subject]:
    """One engine per parameter for the whole module; it gets its first weights back after each test."""
    kind, variant = request.param
    if request.param not in _SUBJECTS:
        path = tiny_model.get(variant)
        model = None if path is None else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        _SUBJECTS[request.param] = Subject(_build(kind, path, vllm_host), model)
    subject = _SUBJECTS[request.param]
    yield subject
    if subject.engine.weight_version != 0:
        subject.update(subject.model, 0)


def requests_for(sampling: SamplingSettings, count: int = len(PROMPTS), seed: int = 100) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{i}", PROMPTS[i % len(PROMPTS)], seed + i, sampling) for i in range(count)]


def perturbed(model: PreTrainedModel | None, seed: int = 7) -> PreTrainedModel | None:
    """A copy with every parameter moved; tied embeddings stay tied."""
    if model is None:
        return None
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return moved


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[T, vocabulary] logits that predict the response's tokens."""
    tokens = torch.tensor([[*prompt, *map(int, response)]])
    return model(tokens).logits[0, len(prompt) - 1 : -1]


def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    logprobs = reference_logits(model, prompt, response).log_softmax(-1)
    return logprobs[torch.arange(len(response)), torch.tensor(np.asarray(response), dtype=torch.int64)].numpy()


def assert_same_distribution(model: PreTrainedModel, request: GenerationRequest, finished: Finished) -> None:
    expected = reference_logprobs(model, request.prompt_tokens, finished.tokens)
    np.testing.assert_allclose(finished.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_a_stop_token_ends_the_response_and_belongs_to_it(subject: Subject) -> None:
    finished = subject.run(requests_for(WITH_EOS, count=12))
    stopped = [each for each in finished if each.finish_reason == "stop"]
    assert stopped
    for each in stopped:
        assert each.tokens[-1] in WITH_EOS.stop_token_ids
        assert not set(each.tokens[:-1]) & set(WITH_EOS.stop_token_ids)


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_the_checkpoints_own_eos_does_not_end_a_response(subject: Subject) -> None:
    finished = subject.run(requests_for(SAMPLED, count=32))
    assert any(1 in each.tokens[:-1] for each in finished)
    assert {(len(each.tokens), each.finish_reason) for each in finished} == {(24, "length")}


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_the_arrays_have_one_entry_per_token(subject: Subject) -> None:
    for each in subject.run(requests_for(WITH_EOS)):
        assert (each.tokens.dtype, each.logprobs.dtype, each.weight_versions.dtype) == (np.int32, np.float32, np.int32)
        assert each.tokens.shape == each.logprobs.shape == each.weight_versions.shape


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_the_context_bounds_a_response(subject: Subject) -> None:
    prompt = tuple(4 + i % 20 for i in range(MAX_CONTEXT_TOKENS - 6))
    (finished,) = subject.run([GenerationRequest("r", prompt, 0, SAMPLED)])
    assert (len(finished.tokens), finished.finish_reason) == (6, "length")
    with pytest.raises(InputError, match="its prompt has 96 tokens"):
        subject.engine.submit(GenerationRequest("r", prompt + prompt[:6], 0, SAMPLED))


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_seeds_reproduce_alone_and_in_a_crowd(subject: Subject) -> None:
    requests = requests_for(SAMPLED, count=12)
    crowd = subject.run(requests)
    (alone,) = subject.run([requests[5]])
    (other,) = subject.run([replace(requests[5], seed=1)])
    np.testing.assert_array_equal(alone.tokens, crowd[5].tokens)
    assert alone.tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_more_requests_than_seats_all_finish(subject: Subject) -> None:
    requests = requests_for(WITH_EOS, count=3 * MAX_NUM_SEQS)
    first, later = requests[:-4], requests[-4:]
    for request in first:
        subject.engine.submit(request)
    finished = {each.request_id for _ in range(5) for each in subject.engine.step()}
    for request in later:  # while others run
        subject.engine.submit(request)
    assert finished | subject.finish(len(requests) - len(finished)).keys() == {each.request_id for each in requests}


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_aborted_requests_never_end_and_leave_the_others_alone(subject: Subject) -> None:
    requests = requests_for(SAMPLED, count=MAX_NUM_SEQS + 4)  # four of them wait for a seat
    alone = {request.request_id: each for request, each in zip(requests, subject.run(requests), strict=True)}
    for request in requests:
        subject.engine.submit(request)
    for _ in range(3):
        subject.engine.step()
    subject.engine.abort(["r0", "r3", f"r{MAX_NUM_SEQS + 1}", "never submitted"])
    left = subject.finish(len(requests) - 3)
    assert left.keys() == alone.keys() - {"r0", "r3", f"r{MAX_NUM_SEQS + 1}"}
    for request_id, finished in left.items():
        assert finished.tokens.tolist() == alone[request_id].tokens.tolist()


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_aborting_everything_leaves_an_engine_that_works(subject: Subject) -> None:
    requests = requests_for(SAMPLED, count=MAX_NUM_SEQS + 2)
    for request in requests:
        subject.engine.submit(request)
    subject.engine.step()
    subject.engine.abort([request.request_id for request in requests])
    assert subject.engine.step() == []
    assert len(subject.run(requests)) == len(requests)  # the same ids are free again


@pytest.mark.parametrize("subject", ANY, indirect=True)
@pytest.mark.parametrize("top_k", [0, 5, 1000])
def test_top_k_ids_come_with_every_token_only_when_asked_for(subject: Subject, top_k: int) -> None:
    for each in subject.run(requests_for(replace(WITH_EOS, top_k=top_k))):
        if top_k == 0:
            assert each.topk_ids is None
            continue
        assert each.topk_ids.dtype == np.int32
        assert each.topk_ids.shape == (len(each.tokens), min(top_k, VOCAB_SIZE))


@pytest.mark.parametrize("subject", MODELS, indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_top_k_ids_are_the_most_probable_tokens(subject: Subject, temperature: float) -> None:
    requests = requests_for(replace(SAMPLED, temperature=temperature, top_k=5))
    for request, finished in zip(requests, subject.run(requests), strict=True):
        logits = reference_logits(subject.model, request.prompt_tokens, finished.tokens)
        expected = logits.topk(5).values.numpy()
        np.testing.assert_allclose(np.take_along_axis(logits.numpy(), finished.topk_ids, 1), expected, atol=TOLERANCE)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_requests_of_one_batch_may_want_different_numbers_of_top_k_ids(subject: Subject) -> None:
    """vLLM gives each as many as any of its batch wants."""
    wanted = (0, 5, 2, 0)
    requests = [
        replace(each, sampling=replace(SAMPLED, top_k=k))
        for each, k in zip(requests_for(SAMPLED, count=len(wanted)), wanted, strict=True)
    ]
    for request, finished in zip(requests, subject.run(requests), strict=True):
        k = request.sampling.top_k
        assert (finished.topk_ids is None) if k == 0 else finished.topk_ids.shape == (len(finished.tokens), k)
        assert_same_distribution(subject.model, request, finished)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_top_k_ids_after_an_update_are_those_of_the_new_weights(subject: Subject) -> None:
    subject.connect()
    requests = requests_for(replace(SAMPLED, top_k=3))
    for request in requests:
        subject.engine.submit(request)
    for _ in range(10):
        subject.engine.step()
    model = perturbed(subject.model)
    subject.update(model, 1, "recompute")
    responses = subject.finish(len(requests))
    for request in requests:
        finished = responses[request.request_id]
        before, after = (
            reference_logits(each, request.prompt_tokens, finished.tokens) for each in (subject.model, model)
        )
        logits = torch.where(torch.from_numpy(finished.weight_versions == 0)[:, None], before, after)
        expected = logits.topk(3).values.numpy()
        np.testing.assert_allclose(np.take_along_axis(logits.numpy(), finished.topk_ids, 1), expected, atol=TOLERANCE)


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_a_step_without_requests_returns_nothing(subject: Subject) -> None:
    assert subject.engine.step() == []


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_logprobs_equal_a_forward_pass(subject: Subject) -> None:
    requests = requests_for(SAMPLED, count=12)
    for request, finished in zip(requests, subject.run(requests), strict=True):
        assert_same_distribution(subject.model, request, finished)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_logprobs_are_those_of_the_tempered_nucleus(subject: Subject) -> None:
    sampling = replace(SAMPLED, temperature=0.7, top_p=0.8)
    requests = requests_for(sampling)
    for request, finished in zip(requests, subject.run(requests), strict=True):
        logits = reference_logits(subject.model, request.prompt_tokens, finished.tokens).numpy() / 0.7
        for token, logprob, row in zip(finished.tokens, finished.logprobs, logits, strict=True):
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            above = probabilities > probabilities[token]
            nucleus = np.sort(probabilities)[::-1]
            mass = nucleus[: np.searchsorted(nucleus.cumsum(), 0.8) + 1].sum()
            assert probabilities[above].sum() < 0.8  # it lies in the nucleus
            assert logprob == pytest.approx(np.log(probabilities[token] / mass), abs=TOLERANCE)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_greedy_equals_transformers(subject: Subject) -> None:
    requests = requests_for(GREEDY)
    for request, finished in zip(requests, subject.run(requests), strict=True):
        prompt = torch.tensor([request.prompt_tokens])
        generated = subject.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=-1
        )
        assert finished.tokens.tolist() == generated[0, prompt.shape[1] :].tolist()
        assert_same_distribution(subject.model, request, finished)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_a_response_that_repeats_itself_ends_with_the_same_token_in_every_engine(subject: Subject) -> None:
    sampling, rule = replace(GREEDY, max_response_tokens=80), RepetitionRule(8, 1, 4)
    whole = subject.run(requests_for(sampling))
    ended = subject.run(requests_for(replace(sampling, repetition_rule=rule)))
    found = [first_repeat(each.tokens, rule) for each in whole]
    assert any(end and end < 80 for end in found)
    for full, finished, end in zip(whole, ended, found, strict=True):
        assert finished.finish_reason == ("repetition" if end and end < 80 else "length")
        np.testing.assert_array_equal(finished.tokens, full.tokens[: end or 80])
        np.testing.assert_allclose(finished.logprobs, full.logprobs[: end or 80], atol=TOLERANCE)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_new_weights_are_those_that_were_sent(subject: Subject) -> None:
    """Tied embeddings: vLLM kept the old output layer when only the embedding was sent."""
    subject.connect()
    model = perturbed(subject.model)
    subject.update(model, 1)
    assert subject.engine.weight_version == 1
    requests = requests_for(SAMPLED)
    for request, finished in zip(requests, subject.run(requests), strict=True):
        assert set(finished.weight_versions) == {1}
        assert_same_distribution(model, request, finished)


def adapted(model: PreTrainedModel, targets: str | tuple[str, ...]) -> tuple[PreTrainedModel, Adapters]:
    """A copy with adapters that are far from 0."""
    moved, lora = copy.deepcopy(model), LoraConfig(rank=3, alpha=6, targets=targets)
    adapters = Adapters(moved, adapted_layers("here", Path(model.name_or_path), lora), lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in adapters.weights():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return moved.eval(), adapters


@pytest.mark.parametrize("subject", MODELS, indirect=True)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")], ids=["all", "parts of fused layers"])
def test_adapters_are_merged_with_the_base_whatever_the_engine_held(
    subject: Subject, targets: str | tuple[str, ...]
) -> None:
    """Weights of another run, an update that broke off, the same update twice: nothing of them is left, and what it
    generates with is what is exported."""
    model, adapters = adapted(subject.model, targets)
    weights, exported = {name: weight.detach() for name, weight in adapters.weights()}, copy.deepcopy(subject.model)
    whole = with_adapters(weights, adapters.lora, Path(subject.model.name_or_path), torch.float32)
    exported.load_state_dict(whole, strict=False)
    subject.connect(bucket_bytes=1)
    subject.update(perturbed(subject.model), 1)
    with pytest.raises(WeightSyncError, match="rank 1 of 2"):
        subject.update_adapters(adapters, 2, cut=3)
    subject.connect()
    for version in (2, 3):
        subject.update_adapters(adapters, version)
        requests = requests_for(SAMPLED, seed=version)
        for request, finished in zip(requests, subject.run(requests), strict=True):
            assert set(finished.weight_versions) == {version}
            assert_same_distribution(model, request, finished)
            assert_same_distribution(exported, request, finished)
    before = reference_logprobs(subject.model, request.prompt_tokens, finished.tokens)
    assert np.abs(finished.logprobs - before).max() > 100 * TOLERANCE


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_versions_change_exactly_at_the_update(subject: Subject) -> None:
    subject.connect()
    requests = requests_for(SAMPLED, count=MAX_NUM_SEQS + 2)  # two of them wait for a seat
    for request in requests:
        subject.engine.submit(request)
    steps = 7
    for _ in range(steps):
        assert subject.engine.step() == []
    model = perturbed(subject.model)
    subject.update(model, 4)
    finished = subject.finish(len(requests))
    for request in requests[:MAX_NUM_SEQS]:
        assert finished[request.request_id].weight_versions.tolist() == [0] * steps + [4] * (24 - steps)
    for request in requests[MAX_NUM_SEQS:]:
        assert finished[request.request_id].weight_versions.tolist() == [4] * 24


def updated_in_the_middle(subject: Subject, model: PreTrainedModel, unfinished: str) -> list[Finished]:
    """Of as many requests as there are seats; the first 20 tokens are of the weights before."""
    subject.connect()
    requests = requests_for(SAMPLED, count=MAX_NUM_SEQS)
    for request in requests:
        subject.engine.submit(request)
    for _ in range(20):
        subject.engine.step()
    subject.update(model, 1, unfinished)
    finished = subject.finish(len(requests))
    return [finished[request.request_id] for request in requests]


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_recomputed_responses_go_on_as_if_all_were_of_the_new_weights(subject: Subject) -> None:
    """vLLM on CPUs died here when the recomputed prefixes exceeded the tokens of one step."""
    model = perturbed(subject.model)
    responses = updated_in_the_middle(subject, model, "recompute")
    for request, finished in zip(requests_for(SAMPLED, count=MAX_NUM_SEQS), responses, strict=True):
        assert set(finished.weight_versions) == {0, 1}
        before = reference_logprobs(subject.model, request.prompt_tokens, finished.tokens)
        after = reference_logprobs(model, request.prompt_tokens, finished.tokens)
        expected = np.where(finished.weight_versions == 0, before, after)
        np.testing.assert_allclose(finished.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_kept_responses_go_on_with_the_keys_and_values_that_they_have(subject: Subject) -> None:
    """Their log-probs are those of what was sampled from: no importance ratio is wrong for it."""
    model = perturbed(subject.model)
    responses = updated_in_the_middle(subject, model, "keep")
    differences = []
    for request, finished in zip(requests_for(SAMPLED, count=MAX_NUM_SEQS), responses, strict=True):
        assert finished.weight_versions.tolist() == [0] * 20 + [1] * 4
        tokens = torch.tensor([[*request.prompt_tokens, *map(int, finished.tokens)]])
        old = len(request.prompt_tokens) + 19  # the 20th was sampled, and its keys and values not made yet
        with torch.inference_mode():
            before = subject.model(tokens[:, :old], use_cache=True)
            after = model(tokens[:, old:-1], past_key_values=before.past_key_values).logits
        logprobs = torch.cat([before.logits, after], 1)[0, len(request.prompt_tokens) - 1 :].log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(finished.tokens, dtype=torch.int64)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(finished.logprobs, expected, atol=TOLERANCE)
        differences.append(expected - reference_logprobs(model, request.prompt_tokens, finished.tokens))
    assert np.abs(np.stack(differences)[:, 20:]).max() > 10 * TOLERANCE


@pytest.mark.vllm
def test_nobody_shares_a_prefix_of_older_weights(tiny_model: dict[str, Path], vllm_host: EngineHost) -> None:
    """Also where the version is the same: a run that went back to a checkpoint sends it again, with other weights."""
    path = tiny_model["untied"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = vllm_host.build(
        "opd_ray.generate.vllm:VllmGenerationEngine",
        path=str(path),
        max_num_seqs=MAX_NUM_SEQS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        kv_cache_bytes=16 * 2**20,
        engine_args={"enable_prefix_caching": True, "block_size": 32},
    )
    subject = Subject(engine, model)
    subject.connect()
    prompt = tuple(4 + i % 20 for i in range(70))
    for version, seed in ((0, None), (1, 1), (1, 2)):
        served = model if seed is None else perturbed(model, seed)
        if seed is not None:
            subject.update(served, version)
        for number in range(2):  # the second shares what the first has left
            request = GenerationRequest("r", prompt, number, SAMPLED)
            assert_same_distribution(served, request, subject.run([request])[0])


@pytest.mark.parametrize("subject", ANY, indirect=True)
def test_restarted_responses_have_one_version(subject: Subject) -> None:
    subject.connect()
    requests = requests_for(SAMPLED, count=MAX_NUM_SEQS + 2)
    for request in requests:
        subject.engine.submit(request)
    for _ in range(5):
        subject.engine.step()
    model = perturbed(subject.model)
    subject.update(model, 1, "restart")
    finished = subject.finish(len(requests))
    for request in requests:
        each = finished[request.request_id]
        assert each.weight_versions.tolist() == [1] * 24
        if model is not None:
            assert_same_distribution(model, request, each)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_connecting_again_leaves_the_former_group(subject: Subject) -> None:
    for version in (1, 2):
        subject.connect()
        subject.update(perturbed(subject.model, seed=version), version)
        assert subject.engine.weight_version == version


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_after_a_broadcast_that_broke_off_a_whole_one_installs_exactly_what_it_sends(subject: Subject) -> None:
    """vLLM kept what it had received of a layer, took it for part of the next broadcast, and dropped the rest."""
    broken, model = perturbed(subject.model, seed=1), perturbed(subject.model, seed=2)
    count = len(manifest_of(weights_of(model), 0).names)
    for version, cut in enumerate((1, 3, count // 2, count - 1), 1):
        subject.connect(bucket_bytes=1)
        with pytest.raises(WeightSyncError, match="rank 1 of 2"):
            subject.update(broken, version, cut=cut)
        assert subject.engine.weight_version == version - 1
        subject.connect()
        subject.update(model, version)
        assert subject.engine.weight_version == version
        requests = requests_for(SAMPLED, seed=version)
        for request, finished in zip(requests, subject.run(requests), strict=True):
            assert_same_distribution(model, request, finished)
        broken, model = perturbed(model, seed=10 * version), perturbed(model, seed=11 * version)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_a_broadcast_that_broke_off_leaves_the_weights_that_were_there(subject: Subject) -> None:
    """Also where it came after one that was installed: the memory that it came into is not in use."""
    first, second = perturbed(subject.model, seed=1), perturbed(subject.model, seed=2)
    count = len(manifest_of(weights_of(first), 0).names)
    for version, model in enumerate((first, second, first), 1):
        subject.connect(bucket_bytes=1)
        subject.update(model, version)
        with pytest.raises(WeightSyncError, match="rank 1 of 2"):
            subject.update(perturbed(model), version + 1, cut=count - 1)
        requests = requests_for(SAMPLED, seed=version)
        for request, finished in zip(requests, subject.run(requests), strict=True):
            assert set(finished.weight_versions) == {version}
            assert_same_distribution(model, request, finished)
    subject.connect()


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_a_step_beside_a_broadcast_is_on_the_old_weights(subject: Subject) -> None:
    subject.connect(bucket_bytes=1)
    model = perturbed(subject.model)
    before, requests = requests_for(SAMPLED), requests_for(SAMPLED, seed=7)
    answers = subject.update_beside(model, 1, before)
    for request, finished in zip(before, answers, strict=True):
        assert set(finished.weight_versions) == {0}
        assert_same_distribution(subject.model, request, finished)
    for request, finished in zip(requests, subject.run(requests), strict=True):
        assert set(finished.weight_versions) == {1}
        assert_same_distribution(model, request, finished)


@pytest.mark.parametrize("subject", [pytest.param(("torch", "untied"), id="torch")], indirect=True)
def test_a_broadcast_that_leaves_parameters_out_is_refused(subject: Subject) -> None:
    manifest = manifest_of(weights_of(subject.model)[1:], 1)
    with pytest.raises(WeightSyncError, match=r"broadcast of version .*: model\.embed_tokens\.weight is missing"):
        subject.engine.receive(manifest)


@pytest.mark.parametrize("subject", MODELS, indirect=True)
def test_a_sender_that_never_comes_is_reported(subject: Subject) -> None:
    group = TransferGroup("gloo", "127.0.0.1", 1, 1, 2, timeout_s=1.0, bucket_bytes=2**14, secret="5ec2e7")
    with pytest.raises(WeightSyncError, match=r"rank 1 of 2 .*127\.0\.0\.1:1"):
        subject.engine.connect(group)
    with pytest.raises(WeightSyncError, match="before connect"):
        subject.engine.receive(manifest_of(weights_of(subject.model), 1))
    assert subject.engine.weight_version == 0
    subject.run(requests_for(SAMPLED))
