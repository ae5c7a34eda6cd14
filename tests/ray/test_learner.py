"""Learner under real DeepSpeed, in Ray actors: every ZeRO stage on one and two ranks.

The yardstick is :func:`plain_training`: the same objective in one padded micro-batch, with torch's own
AdamW and clipping, no DeepSpeed and no Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from opd_ray.actors.learner import Learner
from opd_ray.batching import collate, count, plan_step
from opd_ray.config import Config, from_dict
from opd_ray.errors import InputError, RunError
from opd_ray.heads import ResponseModel, load_heads
from opd_ray.losses.diagnostics import finish
from opd_ray.messages import SCORE_SCHEMA, Coefficients, Entry, StepPlan, TransferGroup, WeightManifest
from opd_ray.objective import Objective
from opd_ray.training import StepOutcome, fetch_payloads, lr_factor
from scored_rollouts import Scoring, scored_entries

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STAGES_AND_RANKS = [(stage, ranks) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
SIZES = [(3, 9), (8, 2), (5, 14), (1, 1), (6, 6)], [(4, 12), (2, 5)]
NUM_STEPS = 5
COEFFICIENTS = Coefficients(student=1.0, golden=0.5, teacher=0.25, reference=0.1)


class RecordingTransport:
    """WeightTransport that keeps what it was told to send."""

    def __init__(self) -> None:
        self.sent: dict[str, torch.Tensor] = {}

    def open(self, group: TransferGroup) -> None:
        raise AssertionError("no group in this test")

    def send(self, manifest: WeightManifest, parameters: Any) -> None:
        for name, shape, dtype, (got, tensor) in zip(
            manifest.names, manifest.shapes, manifest.dtypes, parameters, strict=True
        ):
            assert (name, shape, f"torch.{dtype}") == (got, tuple(tensor.shape), str(tensor.dtype))
            self.sent[name] = tensor.clone()

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

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._learner, method)(*args)

    def train(self, plans: Sequence[StepPlan]) -> list[StepOutcome]:
        return [self._learner.train_step(plan) for plan in plans]

    def cut(self, chunk_rows: int) -> None:
        """From now on a micro-batch of more tokens than this passes the output layer in pieces."""
        self._learner._objective.chunk_rows = chunk_rows

    def overflow_in_backward(self) -> None:
        """From now on a finite loss has an infinite gradient."""
        self._learner._model.model.norm.register_forward_hook(lambda _module, _inputs, output: Overflow.apply(output))

    def sent_weights(self) -> dict[str, torch.Tensor]:
        self._learner._transport = RecordingTransport()
        self._learner.send_weights(self._learner.manifest(1))
        return self._learner._transport.sent


class Ranks:
    """All ranks of one learner; every call goes to all of them at once."""

    def __init__(self, hosts: Sequence[Any], config: Config, student_path: Path, stop_token_ids: Sequence[int]) -> None:
        self._hosts = hosts
        self._config = config.learner
        self.call("begin", config, str(student_path), tuple(stop_token_ids))

    def call(self, method: str, *args: Any) -> list[Any]:
        return ray.get([host.call.remote(method, *args) for host in self._hosts])

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

    def train(self, entries: Sequence[Entry], steps: range) -> list[dict[str, float]]:
        outcomes = self.outcomes(entries, steps)
        assert [outcome.problem for outcome in outcomes] == [None] * len(steps)
        return [outcome.metrics for outcome in outcomes]

    def cut(self, chunk_rows: int) -> None:
        ray.get([host.cut.remote(chunk_rows) for host in self._hosts])

    def sent_weights(self) -> dict[str, torch.Tensor]:
        return ray.get([host.sent_weights.remote() for host in self._hosts])[0]


@pytest.fixture(scope="module")
def hosts(ray_here: None) -> dict[int, list[Any]]:
    """Number of ranks to that many processes."""
    # A worker cannot import this file by name: pytest, not Python, put its directory on the path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return {size: make_hosts(size) for size in (1, 2)}


def make_hosts(size: int) -> list[Any]:
    """Processes that have joined each other."""
    actor = ray.remote(num_cpus=0.1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(Host)
    group = [actor.remote(rank, config_with(size)) for rank in range(size)]
    address = ray.get(group[0].call.remote("node_address"))
    ray.get([host.call.remote("setup", *address) for host in group])
    return group


@pytest.fixture(scope="module")
def entries(ray_here: None) -> list[Entry]:
    return scored_entries(*SIZES, seed=3, put=ray.put)


def config_with(num_ranks: int = 1, loss: dict[str, Any] | None = None, **learner: Any) -> Config:
    defaults = {"steps": NUM_STEPS, "lr": 5e-3, "lr_schedule": "cosine", "warmup_steps": 2, "gradient_clip": 0.5}
    settings = defaults | {"num_ranks": num_ranks} | learner
    defaults_of_loss = {"reduction": "token", "reference": {"coef": 0.1}}
    return from_dict(
        {"learner": settings, "loss": defaults_of_loss | (loss or {}), "rollout": {"responses_per_prompt": 2}}
    )


@pytest.fixture(scope="module")
def teacher_checkpoint(tiny_model: dict[str, Path]) -> Path:
    """A model whose output layer is not the student's."""
    return tiny_model["untied"]


@pytest.fixture
def start(hosts: dict[int, list[Any]], tiny_model: dict[str, Path]) -> Callable[..., Ranks]:
    def build(config: Config, student_path: Path = tiny_model["tied"], stop_token_ids: Sequence[int] = (1,)) -> Ranks:
        return Ranks(hosts[config.learner.num_ranks], config, student_path, stop_token_ids)

    return build


def plain_training(
    config: Config, student_path: Path, entries: Sequence[Entry] | None = None, stop_token_ids: tuple[int, ...] = (1,)
) -> list[dict[str, float]]:
    """Losses, gradient norms and learning rates of NUM_STEPS steps without DeepSpeed, and without cutting them up."""
    entries = scored_entries(*SIZES, seed=3) if entries is None else entries
    plan = StepPlan(0, (tuple(entries),), count(entries), COEFFICIENTS)
    batch = collate(entries, fetch_payloads(plan, lambda refs: refs), packing=False)
    module = ResponseModel(AutoModelForCausalLM.from_pretrained(student_path, dtype="float32"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learner.lr, weight_decay=0.0)
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
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.learner.gradient_clip)
        optimizer.step()
        values = finish({name: value.item() for name, value in loss.metrics.items()})
        tokens = {"trained_tokens": float(plan.denominators.tokens)}
        curve.append(values | {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]} | tokens)
    return curve


def assert_same_curve(
    curve: Sequence[dict[str, float]], expected: Sequence[dict[str, float]], tolerance: float
) -> None:
    assert len(curve) == len(expected)
    for step, (got, wanted) in enumerate(zip(curve, expected, strict=True)):
        assert got == pytest.approx(wanted, abs=tolerance, rel=tolerance), f"step {step}"


@pytest.fixture(scope="module")
def expected_curve(tiny_model: dict[str, Path]) -> list[dict[str, float]]:
    return plain_training(config_with(), tiny_model["tied"])


@pytest.mark.parametrize(("stage", "ranks"), STAGES_AND_RANKS)
def test_every_stage_trains_like_plain_torch(
    start: Callable[..., Ranks], entries: list[Entry], expected_curve: list[dict[str, float]], stage: int, ranks: int
) -> None:
    """With accumulation over micro-batches of uneven size, some of them empty on two ranks."""
    learner = start(config_with(ranks, zero_stage=stage, micro_batch_tokens=20))
    assert_same_curve(learner.train(entries, range(NUM_STEPS)), expected_curve, 1e-4)


@pytest.mark.parametrize(
    ("stage", "ranks", "options"),
    [
        (0, 1, {"packing": True, "micro_batch_tokens": 40}),
        (0, 1, {"gradient_checkpointing": True}),
        (3, 2, {"gradient_checkpointing": True, "packing": True}),
    ],
)
def test_packing_and_checkpointing_change_nothing(
    start: Callable[..., Ranks],
    entries: list[Entry],
    expected_curve: list[dict[str, float]],
    stage: int,
    ranks: int,
    options: dict[str, Any],
) -> None:
    learner = start(config_with(ranks, zero_stage=stage, **options))
    assert_same_curve(learner.train(entries, range(NUM_STEPS)), expected_curve, 1e-4)


def test_more_ranks_than_rollouts(start: Callable[..., Ranks], entries: list[Entry], tiny_model) -> None:
    """A rank without rollouts contributes nothing, and does not stall the collectives of the others."""
    alone = start(config_with(1)).train(entries[:1], range(2))
    assert_same_curve(start(config_with(2, zero_stage=2)).train(entries[:1], range(2)), alone, 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_trains(
    start: Callable[..., Ranks], entries: list[Entry], expected_curve: list[dict[str, float]], stage: int
) -> None:
    learner = start(config_with(2, zero_stage=stage, dtype="bfloat16", micro_batch_tokens=20))
    curve = learner.train(entries, range(NUM_STEPS))
    for got, wanted in zip(curve, expected_curve, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], abs=0.05)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)
    assert set(map(str, {tensor.dtype for tensor in learner.sent_weights().values()})) == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"), [(0, 1, "float32"), (0, 2, "bfloat16")] + [(s, 2, "float32") for s in (1, 2, 3)]
)
def test_a_checkpoint_continues_as_if_nothing_had_happened(
    start: Callable[..., Ranks], entries: list[Entry], tmp_path: Path, stage: int, ranks: int, dtype: str
) -> None:
    """Weights, Adam's moments, the schedule's position: the steps after loading equal those after saving."""
    config = config_with(ranks, zero_stage=stage, dtype=dtype)
    learner = start(config)
    learner.train(entries, range(3))
    learner.call("save_checkpoint", str(tmp_path / "saved"))
    expected = learner.train(entries, range(3, NUM_STEPS))
    resumed = start(config)
    resumed.call("load_checkpoint", str(tmp_path / "saved"))
    assert_same_curve(resumed.train(entries, range(3, NUM_STEPS)), expected, 1e-6)


@pytest.mark.parametrize("saved_by", ["nobody", "two ranks"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    start: Callable[..., Ranks], entries: list[Entry], tmp_path: Path, saved_by: str
) -> None:
    if saved_by == "two ranks":
        start(config_with(2, zero_stage=2)).call("save_checkpoint", str(tmp_path / "saved"))
    with pytest.raises(RunError, match="saved does not load"):
        start(config_with(1, zero_stage=2)).call("load_checkpoint", str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("stage", "ranks", "student"), [(0, 1, "tied"), (3, 2, "tied"), (3, 2, "untied"), (2, 2, "untied")]
)
def test_export_loads_in_transformers_and_equals_what_is_sent(
    start: Callable[..., Ranks],
    entries: list[Entry],
    tiny_model: dict[str, Path],
    tmp_path: Path,
    stage: int,
    ranks: int,
    student: str,
) -> None:
    source = tmp_path / "student"
    AutoModelForCausalLM.from_pretrained(tiny_model[student], dtype=torch.bfloat16).save_pretrained(source)
    (source / "tokenizer.json").write_text('{"of": "the student"}')
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 1}')
    learner = start(config_with(ranks, zero_stage=stage), source)
    learner.train(entries, range(2))
    sent = learner.sent_weights()
    learner.call("export", str(tmp_path / "exported"))

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert exported.dtype == torch.bfloat16
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (source / name).read_bytes()
    assert "lm_head.weight" in sent
    received = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    before = received(torch.arange(8)[None]).logits
    received.load_state_dict(sent)
    after = received(torch.arange(8)[None]).logits
    assert (after - before).abs().max() > 0.05, "training changed nothing"
    assert torch.equal(exported(torch.arange(8)[None]).logits, after)


def poison(entry: Entry) -> Entry:
    """The entry with a teacher that says nan about one token."""
    rows = ray.get(entry.scores["teacher"]).to_pylist()
    rows[entry.row]["topk_logprobs"][0] = float("nan")
    broken = ray.put(pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA))
    return dataclasses.replace(entry, scores=entry.scores | {"teacher": broken})


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_a_loss_that_is_not_finite_skips_the_step_on_every_rank_and_leaves_no_trace(
    start: Callable[..., Ranks], entries: list[Entry], stage: int, ranks: int
) -> None:
    """Weights, Adam's moments, gradients and learning rate: the steps after it equal those of a run without it."""
    config = config_with(ranks, zero_stage=stage, micro_batch_tokens=20)
    expected = start(config).train(entries, range(3))
    learner = start(config)
    sound = learner.train(entries, range(1))
    before = learner.sent_weights()
    [outcome] = learner.outcomes([entries[0], poison(entries[1]), *entries[2:]], range(1, 2))
    assert math.isnan(outcome.metrics["loss"])
    assert outcome.problem.endswith(f"the loss is not finite for {entries[1].meta.rollout_id} (loss_student)")
    after = learner.sent_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_curve(sound + learner.train(entries, range(1, 3)), expected, 1e-6)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")]
)
def test_a_gradient_that_is_not_finite_skips_the_step(
    start: Callable[..., Ranks], hosts: dict[int, list[Any]], entries: list[Entry], stage: int, dtype: str
) -> None:
    learner = start(config_with(zero_stage=stage, dtype=dtype))
    learner.train(entries, range(1))
    before = learner.sent_weights()
    ray.get(hosts[1][0].overflow_in_backward.remote())
    [outcome] = learner.outcomes(entries, range(1, 2))
    assert "although the loss is finite" in outcome.problem and math.isnan(outcome.metrics["loss"])
    after = learner.sent_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_payload_that_many_rollouts_share_is_fetched_once(ray_here: None, entries: list[Entry]) -> None:
    """Refs lose their identity on the way to an actor only if they are sent apart."""

    @ray.remote(num_cpus=0)
    def fetched(plan: StepPlan) -> int:
        sizes = []
        fetch_payloads(plan, lambda refs: sizes.append(len(refs)) or ray.get(refs))
        return sizes[0]

    [plan] = plan_step(entries, step=0, num_ranks=1, micro_batch_tokens=20, packing=False, coefficients=COEFFICIENTS)
    assert ray.get(fetched.remote(plan)) == 7  # two payloads with two scores each, and the golden one


LOSSES = {
    "clipped policy gradient, k3 anchor": {
        "student": {"divergence": "k1"},
        "importance": {"correction": "clip"},
        "reduction": "sequence",
        "reference": {"coef": 0.1, "estimator": "k3"},
    },
    "full vocabulary": {
        "student": {"divergence": "jsd", "support": "full"},
        "reference": {"coef": 0.1, "estimator": "full", "on_golden": True},
    },
    "student's top-k": {"student": {"divergence": "forward_kl", "support": "student_top_k", "tail": "stop_gradient"}},
}


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (3, 2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_loss_trains_like_plain_torch(
    start: Callable[..., Ranks],
    teacher_checkpoint: Path,
    tiny_model: dict[str, Path],
    loss: str,
    stage: int,
    ranks: int,
) -> None:
    config = config_with(ranks, LOSSES[loss], zero_stage=stage, micro_batch_tokens=20)
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, path=str(teacher_checkpoint)))
    roles = ("teacher", "reference")
    scoring = Scoring(
        given=6, hidden=True, stop_token_ids=(1, 2), hidden_size=64, roles={"student": roles, "golden": roles}
    )
    expected = plain_training(config, tiny_model["tied"], scored_entries(*SIZES, seed=3, scoring=scoring), (1, 2))
    entries = scored_entries(*SIZES, seed=3, scoring=scoring, put=ray.put)
    curve = start(config, stop_token_ids=(1, 2)).train(entries, range(NUM_STEPS))
    assert_same_curve(curve, expected, 1e-4)


@pytest.mark.parametrize(("stage", "ranks"), STAGES_AND_RANKS)
def test_pieces_change_nothing_under_any_stage(
    start: Callable[..., Ranks], entries: list[Entry], expected_curve: list[dict[str, float]], stage: int, ranks: int
) -> None:
    """Two ranks have different numbers of pieces, one rank now and then none at all."""
    learner = start(config_with(ranks, zero_stage=stage, micro_batch_tokens=40))
    learner.cut(4)
    assert_same_curve(learner.train(entries, range(NUM_STEPS)), expected_curve, 1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_second_run_in_a_process_is_that_of_a_fresh_one(
    start: Callable[..., Ranks],
    hosts: dict[int, list[Any]],
    entries: list[Entry],
    tiny_model: dict[str, Path],
    stage: int,
) -> None:
    first = config_with(1, {"student": {"divergence": "k1"}}, zero_stage=1, lr=1e-2, dtype="bfloat16")
    start(first, tiny_model["untied"]).train(entries, range(2))
    config = config_with(1, zero_stage=stage)
    second = start(config).train(entries, range(2))
    [fresh] = make_hosts(1)
    assert Ranks([fresh], config, tiny_model["tied"], (1,)).train(entries, range(2)) == second
    ray.kill(fresh)


def test_a_run_on_other_ranks_than_the_process_has_is_refused(start: Callable[..., Ranks], hosts, tiny_model) -> None:
    with pytest.raises(InputError, match="a run on 2 ranks .* was begun on 1"):
        Ranks(hosts[1], config_with(2), tiny_model["tied"], (1,))


@pytest.mark.parametrize(("stage", "ranks", "dtype"), [(0, 2, "float32"), (2, 2, "float32"), (3, 2, "bfloat16")])
def test_an_older_checkpoint_can_be_gone_back_to_in_the_middle_of_a_run(
    start: Callable[..., Ranks], entries: list[Entry], tmp_path: Path, stage: int, ranks: int, dtype: str
) -> None:
    """Also from a step that was not taken: what follows equals what followed the first time."""
    learner = start(config_with(ranks, zero_stage=stage, dtype=dtype))
    learner.train(entries, range(2))
    learner.call("save_checkpoint", str(tmp_path / "saved"))
    expected = learner.train(entries, range(2, NUM_STEPS))
    [outcome] = learner.outcomes([entries[0], poison(entries[1]), *entries[2:]], range(NUM_STEPS, NUM_STEPS + 1))
    assert outcome.problem
    learner.call("load_checkpoint", str(tmp_path / "saved"))
    assert_same_curve(learner.train(entries, range(2, NUM_STEPS)), expected, 1e-6)
