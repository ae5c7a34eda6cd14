"""All ranks of a learner as processes, and the training without DeepSpeed that they are compared with."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import ObjectLostError
from transformers import AutoModelForCausalLM

from opd_ray.buffer.plan import count, plan_step
from opd_ray.config import Config, ScorerConfig, from_dict
from opd_ray.learn.adapters import Adapters
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.learner import Learner
from opd_ray.learn.losses.diagnostics import finish
from opd_ray.learn.microbatch import collate, fetch_payloads, lr_factor
from opd_ray.learn.objective import Objective
from opd_ray.learn.student import load_student
from opd_ray.messages import (
    REFERENCE,
    SCORE_SCHEMA,
    Coefficients,
    Entry,
    StepOutcome,
    StepPlan,
    TransferGroup,
    WeightManifest,
)
from opd_ray.models.adapters import adapted_layers
from opd_ray.models.heads import load_heads
from opd_ray.score.requests import reference_request
from opd_ray.score.scorer import Scorer
from opd_ray.score.torch import TorchScoringEngine
from scored_rollouts import scored_entries

SIZES = [(3, 9), (8, 2), (5, 14), (1, 1), (6, 6)], [(4, 12), (2, 5)]
NUM_STEPS = 5
COEFFICIENTS = Coefficients(student=1.0, golden=0.5, teacher=0.25, reference=0.1)


class RecordingTransfer:
    """A WeightTransfer that keeps what it was told to send."""

    def __init__(self) -> None:
        self.sent: dict[str, torch.Tensor] = {}

    def connect(self, group: TransferGroup) -> None:
        raise AssertionError("no group in this test")

    def send(self, manifest: WeightManifest, parameters: Any) -> None:
        for name, shape, dtype, (got, tensor) in zip(
            manifest.names, manifest.shapes, manifest.dtypes, parameters, strict=True
        ):
            assert (name, shape, f"torch.{dtype}") == (got, tuple(tensor.shape), str(tensor.dtype))
            self.sent[name] = tensor.clone()
        self.sent |= {other: self.sent[name] for other, name in manifest.tied}

    def close(self) -> None:
        pass


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


class Host:
    """A learner's process, which trains one run after another."""

    def __init__(self, rank: int, config: Config) -> None:
        self._learner = Learner(config, rank)
        self._lost: set[Any] = set()
        self._gate = threading.Event()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._learner, method)(*args)

    def share(self) -> tuple[dict[str, Any], Any]:
        """The facts of a snapshot, and a ref of this rank's arrays."""
        facts, arrays = self._learner.snapshot()
        return facts, [ray.put(arrays)]

    def train(self, plans: Sequence[StepPlan]) -> list[StepOutcome]:
        return [self._learner.train_step(plan, self._fetch) for plan in plans]

    def wait(self) -> tuple[str, int]:
        """Keeps the thread of the default group until ``go_on``; its name, and torch's threads in it."""
        assert self._gate.wait(60)
        return threading.current_thread().name, torch.get_num_threads()

    def go_on(self) -> str:
        self._gate.set()
        return threading.current_thread().name

    def lose(self, refs: Sequence[Any]) -> None:
        """From now on these objects are gone."""
        self._lost |= set(refs)

    def _fetch(self, refs: list[Any]) -> list[Any]:
        for ref in self._lost.intersection(refs):
            raise ObjectLostError(ref.hex(), None, "")
        return ray.get(refs)

    def load_split(self, path: str) -> tuple[float, dict[str, torch.Tensor]]:
        """The largest share of a parameter that this rank keeps when a bfloat16 student is loaded at ZeRO-3, and the
        model's buffers."""
        model = load_student(Path(path), config_with(dtype="bfloat16").learner, 3, torch.device("cpu"))
        kept = [(part.numel() + part.ds_tensor.numel()) / part.ds_numel for part in model.parameters()]
        return max(kept), dict(model.named_buffers())

    def draw(self) -> list[float]:
        """From torch's random generator."""
        return torch.rand(3).tolist()

    def cut(self, chunk_rows: int) -> None:
        """From now on a micro-batch of more tokens than this passes the output layer in pieces."""
        self._learner._objective.chunk_rows = chunk_rows

    def overflow_in_backward(self) -> None:
        """From now on a finite loss has an infinite gradient."""
        self._learner._model.model.norm.register_forward_hook(lambda _module, _inputs, output: Overflow.apply(output))

    def sent_weights(self) -> dict[str, torch.Tensor]:
        usual, self._learner._transfer = self._learner._transfer, RecordingTransfer()
        self._learner.send_weights(self._learner.manifest(1))
        recorded, self._learner._transfer = self._learner._transfer, usual
        return recorded.sent


class Ranks:
    """All ranks of one learner; every call goes to all of them at once."""

    def __init__(self, hosts: Sequence[Any], config: Config, student_path: Path, stop_token_ids: Sequence[int]) -> None:
        self._hosts = hosts
        self._config = config.learner
        self.call("begin", config, str(student_path), tuple(stop_token_ids))

    def call(self, method: str, *args: Any) -> list[Any]:
        return ray.get(self.begin_call(method, *args))

    def each(self, method: str) -> list[Any]:
        """What a method of every host returns."""
        return ray.get([getattr(host, method).remote() for host in self._hosts])

    def outcomes(self, entries: Sequence[Entry], steps: range) -> list[StepOutcome]:
        plan = functools.partial(
            plan_step,
            num_ranks=len(self._hosts),
            micro_batch_tokens=self._config.micro_batch_tokens,
            packing=self._config.packing,
            coefficients=COEFFICIENTS,
        )
        per_step = [plan(entries, step=step) for step in steps]
        results = ray.get(
            [host.train.remote([plans[rank] for plans in per_step]) for rank, host in enumerate(self._hosts)]
        )
        assert all(repr(result) == repr(results[0]) for result in results), "ranks disagree on the step's outcome"
        return results[0]

    def begin_call(self, method: str, *args: Any) -> list[Any]:
        """The refs of a call to all ranks."""
        return [host.call.remote(method, *args) for host in self._hosts]

    def train(self, entries: Sequence[Entry], steps: range) -> list[dict[str, float]]:
        outcomes = self.outcomes(entries, steps)
        assert [outcome.problem for outcome in outcomes] == [None] * len(steps)
        return [outcome.metrics for outcome in outcomes]

    def snapshot(self) -> tuple[dict[str, Any], list[Any]]:
        """Facts, as they are after a way through JSON, and the refs of every rank's arrays."""
        shares = self.each("share")
        assert all(facts == shares[0][0] for facts, _ in shares)
        return json.loads(json.dumps(shares[0][0])), [ref for _, refs in shares for ref in refs]

    def restore(self, snapshot: tuple[dict[str, Any], list[Any]]) -> None:
        self.call("restore", *snapshot)

    def cut(self, chunk_rows: int) -> None:
        ray.get([host.cut.remote(chunk_rows) for host in self._hosts])

    def sent_weights(self) -> dict[str, torch.Tensor]:
        return self.each("sent_weights")[0]


def make_hosts(size: int) -> list[Any]:
    """Processes that have joined each other."""
    # As a run's learners: with a second thread, so that none of the methods runs in the main one.
    actor = ray.remote(num_cpus=0.1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}, concurrency_groups={"io": 1})(
        Host
    )
    group = [actor.remote(rank, config_with(size)) for rank in range(size)]
    address = ray.get(group[0].call.remote("node_address"))
    ray.get([host.call.remote("setup", *address, "5ec2e7") for host in group])
    return group


def config_with(
    num_ranks: int = 1, loss: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **learner: Any
) -> Config:
    defaults = {"steps": NUM_STEPS, "lr": 5e-3, "lr_schedule": "cosine", "warmup_steps": 2, "gradient_clip": 0.5}
    settings = defaults | {"num_ranks": num_ranks} | learner
    defaults_of_loss = {"reduction": "token", "reference": {"coef": 0.1}}
    return from_dict(
        {
            "student": {"lora": lora},
            "learner": settings,
            "loss": defaults_of_loss | (loss or {}),
            "rollout": {"responses_per_prompt": 2, "repetition_detection": {"min_pattern_size": 1, "min_count": 3}},
        }
    )


def plain_training(
    config: Config, student_path: Path, entries: Sequence[Entry] | None = None, stop_token_ids: tuple[int, ...] = (1,)
) -> list[dict[str, float]]:
    """Losses, gradient norms and learning rates of NUM_STEPS steps without DeepSpeed, and without cutting them up."""
    entries = scored_entries(*SIZES, seed=3) if entries is None else entries
    plan = StepPlan(0, (tuple(entries),), count(entries), COEFFICIENTS)
    batch = collate(entries, fetch_payloads(plan, lambda refs: refs)[0], packing=False, loops=config.told_loops)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype="float32")
    if lora := config.student.lora:
        Adapters(model, adapted_layers("here", student_path, lora), lora)
    module = ResponseModel(model)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learner.lr, weight_decay=0.0)
    objective = Objective(
        config,
        vocab_size=module.vocab_size,
        stop_token_ids=stop_token_ids,
        heads=load_heads(config, str(student_path), torch.device("cpu")),
    )
    curve = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = config.learner.lr * lr_factor(config.learner, step)
        optimizer.zero_grad()
        loss = objective.of(batch, plan.denominators, plan.coefficients)
        module.consume(loss)
        module(batch.input_ids, None, batch.logit_index).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.learner.gradient_clip)
        optimizer.step()
        values = finish(loss.metrics)
        tokens = {"trained_tokens": float(plan.denominators.tokens)}
        curve.append(values | {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]} | tokens)
    return curve


def scored_by_reference(entries: Sequence[Entry], config: Config, path: Path) -> list[Entry]:
    """The entries as a reference scorer on the checkpoint at ``path`` scores them."""
    scorer = Scorer(make_engine=lambda: TorchScoringEngine(path=str(path)), scorer=ScorerConfig(), member=False)
    request = reference_request(config, (1,))
    payloads = {id(entry.rollouts): asyncio.run(scorer.score(entry.rollouts, request))[1] for entry in entries}
    return [
        dataclasses.replace(entry, scores=entry.scores | {REFERENCE: payloads[id(entry.rollouts)]}) for entry in entries
    ]


def assert_same_curve(
    curve: Sequence[dict[str, float]], expected: Sequence[dict[str, float]], tolerance: float
) -> None:
    assert len(curve) == len(expected)
    for step, (got, wanted) in enumerate(zip(curve, expected, strict=True)):
        assert got == pytest.approx(wanted, abs=tolerance, rel=tolerance), f"step {step}"


def poison(entry: Entry) -> Entry:
    """The entry with a teacher that says nan about one token."""
    rows = ray.get(entry.scores["teacher"]).to_pylist()
    rows[entry.row]["topk_logprobs"][0] = float("nan")
    broken = ray.put(pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA))
    return dataclasses.replace(entry, scores=entry.scores | {"teacher": broken})
