"""Scorers that follow the student, over a real gloo broadcast: what N versions leave behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd_ray.config import LoraConfig, ScorerConfig
from opd_ray.errors import RunError, WeightSyncError
from opd_ray.learn.adapters import Adapters
from opd_ray.messages import ScoreRequest, TransferGroup, WeightManifest
from opd_ray.models.adapters import adapted_layers
from opd_ray.rooms.node import free_port
from opd_ray.score.engine import Rollout
from opd_ray.score.follower import Follower
from opd_ray.score.torch import TorchScoringEngine
from opd_ray.weights.manifest import manifest_of, weights_of
from opd_ray.weights.transfer import WeightTransfer

DECAY = 0.9
ROLLOUT = Rollout(np.array([5, 6, 7]), np.array([8, 9, 10, 1], np.int32))
Weights = dict[str, np.ndarray]


@dataclass
class Followed:
    """A student whose weights wander, and a scorer that follows it."""

    student: PreTrainedModel
    engine: TorchScoringEngine
    follower: Follower
    transfer: WeightTransfer

    def broadcast(self, version: int) -> None:
        self._send(weights_of(self.student), manifest_of(weights_of(self.student), version))

    def broadcast_adapters(self, adapters: Adapters, version: int, base: Path) -> None:
        manifest = manifest_of(adapters.weights(), version)
        self._send(adapters.weights(), replace(manifest, base=str(base), scale=adapters.lora.scale))

    def _send(self, weights: list[tuple[str, torch.Tensor]], manifest: WeightManifest) -> None:
        with ThreadPoolExecutor(1) as thread:
            received = thread.submit(self.follower.receive, manifest)
            self.transfer.send(manifest, weights)
            received.result()
        self.follower.install()

    def train(self, version: int) -> Weights:
        """Moves the student, broadcasts it, and returns its weights in float64."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.broadcast(version)
        return numbers(self.student)

    def held(self) -> Weights:
        return {name: parameter.detach().double().numpy() for name, parameter in self.engine.parameters().items()}


def numbers(model: PreTrainedModel) -> Weights:
    return {name: parameter.detach().double().numpy().copy() for name, parameter in weights_of(model)}


def read_only(snapshot: tuple[dict[str, int], Weights]) -> tuple[dict[str, int], Weights]:
    """As it comes out of the object store."""
    for array in snapshot[1].values():
        array.flags.writeable = False
    return snapshot


def assert_same(held: Weights, expected: Weights, **tolerance: float) -> None:
    assert held.keys() == expected.keys()
    for name, values in held.items():
        np.testing.assert_allclose(values, expected[name], err_msg=name, **tolerance)


def follow(path: Path, update: str, *, every_steps: int = 3, dtype: str = "float32") -> Followed:
    engine = TorchScoringEngine(path=str(path), device="cpu", dtype=dtype)
    rule = ScorerConfig(update=update, update_every_steps=every_steps, update_decay=DECAY)
    follower, transfer = Follower(engine.parameters(), rule), WeightTransfer()
    port = free_port()
    group = TransferGroup("gloo", "127.0.0.1", port, 0, 2, timeout_s=20.0, bucket_bytes=2**12, secret="5ec2e7")
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(follower.connect, replace(group, rank=1))
        transfer.connect(group)
        joined.result()
    return Followed(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), engine, follower, transfer)


@pytest.fixture(params=["untied", "tied"])
def path(request: pytest.FixtureRequest, tiny_model: dict[str, Path]) -> Path:
    """Tied: the broadcast has the embedding under two names, and averaging must count it once."""
    return tiny_model[request.param]


def test_the_average_equals_a_float64_loop(path: Path) -> None:
    followed = follow(path, "average")
    expected = numbers(followed.student)
    followed.broadcast(0)
    assert_same(followed.held(), expected, atol=0)
    for version in range(1, 13):
        student = followed.train(version)
        expected = {name: DECAY * expected[name] + (1 - DECAY) * student[name] for name in expected}
    assert_same(followed.held(), expected, atol=1e-6)


def test_the_average_of_a_bfloat16_model_is_kept_in_float32(path: Path) -> None:
    """A hundredth of a small change is lost in bfloat16's eight bits."""
    followed = follow(path, "average", dtype="bfloat16")
    expected = followed.held()
    for version in range(1, 13):
        student = followed.train(version)
        expected = {name: DECAY * expected[name] + (1 - DECAY) * student[name] for name in expected}
    assert_same(followed.held(), expected, rtol=2**-8, atol=1e-6)


def test_a_periodic_one_is_renewed_exactly_at_multiples(path: Path) -> None:
    followed = follow(path, "periodic", every_steps=3)
    expected = numbers(followed.student)
    for version in range(1, 8):
        student = followed.train(version)
        expected = student if version % 3 == 0 else expected
        assert_same(followed.held(), expected, atol=0)


def test_what_follows_a_student_with_adapters_gets_the_base_with_them(path: Path) -> None:
    """No more than A and B arrive; a renewed one has the merged weights, and an average moves towards them."""
    lora = LoraConfig(rank=2, alpha=4)
    for update, share in (("periodic", 1.0), ("average", 1 - DECAY)):
        followed = follow(path, update, every_steps=1)
        base = followed.held()
        adapters = Adapters(followed.student, adapted_layers("here", path, lora), lora)
        followed.broadcast_adapters(adapters, 0, path)
        for _, weight in adapters.weights():
            torch.nn.init.constant_(weight, 0.1)
        followed.broadcast_adapters(adapters, 1, path)
        moved = {
            name: base[name] + share * 2 * 2 * 0.01 * (name.endswith("proj.weight")) for name in base
        }  # scale · B A, both of 0.1 and rank 2
        assert_same(followed.held(), moved, atol=1e-6)


def test_a_fixed_member_of_the_group_stays_as_it_is(path: Path) -> None:
    followed = follow(path, "fixed")
    expected = numbers(followed.student)
    for version in range(1, 4):
        followed.train(version)
    assert_same(followed.held(), expected, atol=0)


def test_scores_are_those_of_the_weights_that_it_holds(path: Path) -> None:
    followed = follow(path, "periodic", every_steps=1)
    (before,) = followed.engine.score([ROLLOUT], ScoreRequest())
    followed.train(1)
    (after,) = followed.engine.score([ROLLOUT], ScoreRequest())
    tokens = torch.from_numpy(np.concatenate([ROLLOUT.prompt_tokens, ROLLOUT.response_tokens]))[None]
    with torch.inference_mode():
        logprobs = followed.student(tokens).logits[0, 2:-1].log_softmax(-1)
    expected = logprobs[torch.arange(4), tokens[0, 3:]].numpy()
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-5)
    assert np.abs(after.logprobs - before.logprobs).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", ["average", "periodic"])
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(path: Path, update: str, dtype: str) -> None:
    through, stopped = follow(path, update, dtype=dtype), follow(path, update, dtype=dtype)
    for version in range(1, 5):
        through.train(version)
        stopped.train(version)
    facts, arrays = read_only(stopped.follower.snapshot())
    assert facts == {"version": 4}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    resumed = follow(path, update, dtype=dtype)
    resumed.student.load_state_dict(stopped.student.state_dict())
    resumed.follower.restore(facts, arrays)
    resumed.broadcast(4)  # a run begins with the version it goes on from
    for version in range(5, 9):
        through.train(version)
        resumed.train(version)
    assert_same(resumed.held(), through.held(), atol=0)


def test_without_what_was_saved_it_takes_the_first_weights_as_they_are(path: Path) -> None:
    followed = follow(path, "average")
    student = followed.train(40)
    assert_same(followed.held(), student, atol=0)
    after = followed.train(41)
    expected = {name: DECAY * student[name] + (1 - DECAY) * after[name] for name in student}
    assert_same(followed.held(), expected, atol=1e-6)


def test_going_back_needs_the_weights_of_then(path: Path) -> None:
    followed = follow(path, "average")
    followed.train(1)
    held, then = followed.held(), read_only(followed.follower.snapshot())
    followed.train(2)
    with pytest.raises(WeightSyncError, match="holds version 2, but version 1 was sent; restore its weights"):
        followed.follower.receive(manifest_of(weights_of(followed.student), 1))
    followed.follower.restore(*then)
    assert followed.follower.version == 1
    assert_same(followed.held(), held, atol=0)
    followed.train(2)


def test_another_architecture_is_refused(path: Path) -> None:
    followed = follow(path, "average")
    weights = weights_of(followed.student)
    with pytest.raises(WeightSyncError, match=r"broadcast of version 1 .*: model\.embed_tokens\.weight is missing;"):
        followed.follower.receive(manifest_of(weights[1:], 1))
    wider = [(name, torch.zeros(3, 3) if name == "model.norm.weight" else weight) for name, weight in weights]
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight is \[3, 3\] instead of \[64\]"):
        followed.follower.receive(manifest_of(wider, 1))


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(path: Path) -> None:
    followed = follow(path, "average")
    held, (facts, arrays) = followed.held(), followed.follower.snapshot()
    norm = "model.norm.weight"
    fewer = {name: array + 1 for name, array in arrays.items() if name != norm}
    with pytest.raises(RunError, match=rf"not its model's: {norm} is missing; resume"):
        followed.follower.restore(facts, fewer)
    # One that PyTorch would broadcast into the parameter.
    with pytest.raises(RunError, match=rf"snapshot .* {norm} is \[1\] instead of \[64\]"):
        followed.follower.restore(facts, {norm: np.ones(1, np.float32), **fewer})
    assert_same(followed.held(), held, atol=0)
