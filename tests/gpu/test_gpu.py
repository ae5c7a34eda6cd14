"""What one CUDA device can show: the bf16 learner, the torch engine, vLLM, and weights sent from the device.

NCCL refuses two ranks on one device, so its broadcast needs two; what runs here is gloo.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_ray.buffer.plan import plan_step
from opd_ray.config import ScorerConfig, from_dict
from opd_ray.generate.torch import TorchGenerationEngine
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.student import load_student
from opd_ray.messages import (
    Coefficients,
    GenerationRequest,
    SamplingSettings,
    ScoreRequest,
    TransferGroup,
    WeightManifest,
)
from opd_ray.models.inputs import lay_out
from opd_ray.placement.nodes import cards
from opd_ray.rooms.memory import own_memory
from opd_ray.rooms.node import free_port
from opd_ray.score.engine import Rollout
from opd_ray.score.follower import Follower
from opd_ray.score.torch import TorchScoringEngine
from opd_ray.weights.manifest import dtype_name
from scored_rollouts import scored_entries

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

ENTRIES = scored_entries([(3, 9), (8, 2), (5, 14), (6, 6)], [(4, 12), (2, 5)])
COEFFICIENTS = Coefficients(student=1.0, golden=0.5, teacher=0.0, reference=0.1)
AVERAGE = ScorerConfig(update="average", update_decay=0.5)
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=12, stop_token_ids=(1,))


def make_learner(path: Path, dtype: str, gpus: float):
    from opd_ray.learn.learner import Learner

    config = from_dict(
        {
            "learner": {"dtype": dtype, "gpus_per_rank": gpus, "zero_stage": 1, "lr": 1e-3},
            "weights": {"backend": "gloo"},
        }
    )
    learner = Learner(config, 0)
    learner.setup("127.0.0.1", free_port(), "5ec2e7")
    learner.begin(config, str(path), (1,))
    return learner


@pytest.fixture(scope="module")
def learner(tiny_model):
    return make_learner(tiny_model["tied"], "bfloat16", gpus=1)


def plan(step: int):
    return plan_step(ENTRIES, step=step, num_ranks=1, micro_batch_tokens=64, packing=False, coefficients=COEFFICIENTS)[
        0
    ]


def test_the_bf16_learner_under_deepspeed_lowers_its_loss(learner):
    losses = [learner.train_step(plan(step), fetch=lambda refs: refs).metrics["loss"] for step in range(10)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def sent_by(learner) -> dict[str, torch.Tensor]:
    """Name to tensor, a tied one under each of its names."""
    sent = dict(learner._whole_weights())
    return sent | {other: sent[name] for other, name in learner.manifest(1).tied}


def broadcast(learner, connect, update, version: int) -> WeightManifest:
    """Joins one receiver to the learner and sends it the learner's weights."""
    port = free_port()
    groups = [TransferGroup("gloo", "127.0.0.1", port, rank, 2, 60.0, 2**20, "5ec2e7") for rank in (0, 1)]
    manifest = learner.manifest(version)
    sender = threading.Thread(target=lambda: (learner.open_transport(groups[0]), learner.send_weights(manifest)))
    sender.start()
    connect(groups[1])
    update(manifest)
    sender.join(60)
    return manifest


def test_weights_on_the_device_reach_an_engine_on_the_device(learner, tiny_model):
    """After a broadcast from the CUDA learner the CUDA engine scores as the learner's own weights do."""
    engine = TorchGenerationEngine(path=str(tiny_model["tied"]), dtype="bfloat16", device="cuda")
    broadcast(learner, engine.connect, engine.receive, 1)
    engine.install("keep")
    assert engine.weight_version == 1
    sent = sent_by(learner)
    loaded = dict(engine._model.named_parameters())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, sent[name].to(tensor)), name


def test_the_torch_engines_agree_between_devices(tiny_model):
    path = str(tiny_model["untied"])
    random = np.random.default_rng(0)
    rollouts = [
        Rollout(
            random.integers(2, 32, 5), random.integers(2, 32, size), np.tile(np.arange(6, dtype=np.int32), (size, 1))
        )
        for size in (3, 20, 9)
    ]
    request = ScoreRequest(top_k=8, given=True, hidden=True, stop_token_ids=(1, 3))
    scores = {
        device: TorchScoringEngine(path=path, device=device).score(rollouts, request) for device in ("cpu", "cuda")
    }
    for ours, theirs in zip(scores["cpu"], scores["cuda"], strict=True):
        for name in ("logprobs", "topk_logprobs", "given_logprobs", "stop_logprobs", "hidden"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-3, err_msg=name)


def test_a_scorer_on_the_device_follows_the_learner(learner, tiny_model):
    """The average of a bfloat16 model is kept in float32, on the device."""
    engine = TorchScoringEngine(path=str(tiny_model["tied"]), dtype="bfloat16", device="cuda")
    before = {name: parameter.detach().double().cpu() for name, parameter in engine.parameters().items()}
    follower = Follower(engine.parameters(), AVERAGE)
    manifest = broadcast(learner, follower.connect, follower.receive, 1)
    follower.install()
    sent = sent_by(learner)
    for name, parameter in engine.parameters().items():
        expected = 0.5 * before[name] + 0.5 * sent[name].double().cpu()
        np.testing.assert_allclose(parameter.detach().double().cpu(), expected, rtol=2**-8, atol=1e-6, err_msg=name)
    assert follower.version == manifest.version


def test_vllm_on_the_device_agrees_with_the_torch_engine(tiny_model):
    pytest.importorskip("vllm", reason="needs vLLM's CUDA build")
    from opd_ray.generate.vllm import VllmGenerationEngine

    path = str(tiny_model["untied"])
    engines = (
        VllmGenerationEngine(path=path, gpu_memory_utilization=0.3, max_context_tokens=96),
        TorchGenerationEngine(path=path, device="cuda"),
    )
    responses = []
    for engine in engines:
        engine.submit(GenerationRequest("0", (5, 9, 12), 0, GREEDY))
        finished = []
        while not finished:
            finished = engine.step()
        responses.append(finished[0])
    assert responses[0].tokens.tolist() == responses[1].tokens.tolist()
    np.testing.assert_allclose(responses[0].logprobs, responses[1].logprobs, atol=1e-2)


def test_vllm_on_the_device_scores_chosen_tokens_as_the_torch_engine_does(tiny_model):
    """The V2 runner's prompt_logprob_token_ids: the student's top-k, and P(stop) without looking for it."""
    pytest.importorskip("vllm", reason="needs vLLM's CUDA build")
    from opd_ray.score.vllm import VllmScoringEngine

    path = str(tiny_model["untied"])
    random = np.random.default_rng(0)
    rollouts = [
        Rollout(
            random.integers(2, 32, 5),
            random.integers(1, 32, size),
            random.permuted(np.tile(np.arange(32), (size, 1)), axis=1)[:, :6],
        )
        for size in (3, 40, 0)
    ]
    request = ScoreRequest(top_k=4, given=True, stop_token_ids=(1, 3))
    ours = VllmScoringEngine(path=path, gpu_memory_utilization=0.3, max_context_tokens=96).score(rollouts, request)
    for our, their in zip(ours, TorchScoringEngine(path=path, device="cuda").score(rollouts, request), strict=True):
        for name in ("logprobs", "topk_logprobs", "given_logprobs", "stop_logprobs"):
            np.testing.assert_allclose(getattr(our, name), getattr(their, name), atol=1e-2, err_msg=name)


def states(dtype: torch.dtype, path: Path, packing: bool) -> torch.Tensor:
    """Of three sequences, from a learner's attention on the device."""
    settings = {"packing": packing, "dtype": dtype_name(dtype), "gpus_per_rank": 1}
    learner = from_dict({"learner": settings}).learner
    module = ResponseModel(load_student(path, learner, 0, torch.device("cuda")), packing=packing)
    random, found = np.random.default_rng(0), []
    responses = [random.integers(2, 32, size) for size in (20, 3, 9)]
    module.consume(lambda hidden, head: found.append(hidden) or hidden.sum())
    laid = lay_out([response[:2] for response in responses], responses, packing=packing)
    with torch.no_grad():
        module(*(None if each is None else each.cuda() for each in laid))
    return found[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_on_the_device_are_what_padded_ones_are(tiny_model, dtype: torch.dtype):
    """In bfloat16 by flash attention, where flash-attn is installed."""
    packed, padded = (states(dtype, tiny_model["untied"], packing) for packing in (True, False))
    torch.testing.assert_close(packed, padded, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)


def test_the_plan_knows_the_card_and_what_a_process_has_taken_of_it():
    [card] = cards()[:1]
    assert card.memory_bytes == pytest.approx(torch.cuda.get_device_properties(0).total_memory, rel=0.1)
    assert int(card.driver.partition(".")[0]) >= 500
    torch.cuda.empty_cache()
    taken = own_memory().gpu_bytes or 0
    block = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    assert own_memory().gpu_bytes >= max(taken, block.numel())
    del block
    torch.cuda.empty_cache()
    assert own_memory().gpu_bytes >= 2**30, "the most that it ever had"
