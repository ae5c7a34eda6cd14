"""Learner under real DeepSpeed, in Ray actors: every ZeRO stage on one and two ranks.

The yardstick is :func:`plain_training`: the same objective in one padded micro-batch, with torch's own
AdamW and clipping, no DeepSpeed and no Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

import learner_ranks
from learner_ranks import NUM_STEPS, SIZES, Ranks, assert_same_curve, config_with, make_hosts, plain_training, poison
from opd_ray.buffer.plan import count
from opd_ray.config import Config
from opd_ray.errors import RunError, WeightSyncError
from opd_ray.learn.microbatch import fetch_payloads
from opd_ray.messages import Entry, StepPlan, TransferGroup
from opd_ray.models.checkpoints import read_weights
from opd_ray.models.heads import load_head
from opd_ray.rooms.node import free_port
from opd_ray.weights.adapters import merged
from opd_ray.weights.transfer import WeightTransfer
from scored_rollouts import Scoring, scored_entries

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STAGES_AND_RANKS = [(stage, ranks) for ranks in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def hosts(ray_here: None) -> dict[int, list[Any]]:
    """Number of ranks to that many processes."""
    # A worker cannot import tests by name: pytest, not Python, put their directories on the path.
    ray.cloudpickle.register_pickle_by_value(learner_ranks)
    return {size: make_hosts(size) for size in (1, 2)}


@pytest.fixture(scope="module")
def entries(ray_here: None) -> list[Entry]:
    return scored_entries(*SIZES, seed=3, put=ray.put)


@pytest.fixture(scope="module")
def teacher_checkpoint(tiny_model: dict[str, Path]) -> Path:
    """A model whose output layer is not the student's."""
    return tiny_model["untied"]


@pytest.fixture
def start(hosts: dict[int, list[Any]], tiny_model: dict[str, Path]) -> Callable[..., Ranks]:
    def build(config: Config, student_path: Path = tiny_model["tied"], stop_token_ids: Sequence[int] = (1,)) -> Ranks:
        return Ranks(hosts[config.learner.num_ranks], config, student_path, stop_token_ids)

    return build


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
        (0, 1, {"packing": False, "micro_batch_tokens": 40}),
        (0, 1, {"gradient_checkpointing": True}),
        (3, 2, {"gradient_checkpointing": True, "packing": False}),
    ],
)
def test_padding_and_checkpointing_change_nothing(
    start: Callable[..., Ranks],
    entries: list[Entry],
    expected_curve: list[dict[str, float]],
    stage: int,
    ranks: int,
    options: dict[str, Any],
) -> None:
    learner = start(config_with(ranks, zero_stage=stage, **options))
    assert_same_curve(learner.train(entries, range(NUM_STEPS)), expected_curve, 1e-4)


def test_at_zero_3_a_rank_loads_its_part_alone_and_frequencies_keep_their_precision(
    hosts: dict[int, list[Any]], tiny_model: dict[str, Path]
) -> None:
    """The bugs: every rank loaded the whole model first; zero.Init made rotary frequencies bfloat16, as parameters."""
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_model["tied"]).named_buffers())
    for kept, buffers in ray.get([host.load_split.remote(str(tiny_model["tied"])) for host in hosts[2]]):
        assert kept == 0.5
        assert buffers.keys() == plain.keys()
        for name, buffer in buffers.items():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, plain[name]), name


def test_more_ranks_than_rollouts(start: Callable[..., Ranks], entries: list[Entry], tiny_model) -> None:
    """A rank without rollouts contributes nothing, and does not stall the collectives of the others."""
    alone = start(config_with(1)).train(entries[:1], range(2))
    assert_same_curve(start(config_with(2, zero_stage=2)).train(entries[:1], range(2)), alone, 1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_trains(
    start: Callable[..., Ranks], entries: list[Entry], expected_curve: list[dict[str, float]], stage: int
) -> None:
    learner = start(config_with(2, zero_stage=stage, dtype="bfloat16", micro_batch_tokens=20))
    curve = learner.train(entries, range(NUM_STEPS))
    for got, wanted in zip(curve, expected_curve, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], abs=0.05)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)
    assert set(map(str, {tensor.dtype for tensor in learner.sent_weights().values()})) == {"torch.bfloat16"}


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_a_snapshot_continues_on_any_number_of_ranks(
    start: Callable[..., Ranks], entries: list[Entry], stage: int, dtype: str
) -> None:
    """Weights, Adam's moments, the schedule's position: the steps after it equal those that followed the first time.

    On as many ranks bit for bit up to the order of sums, else within float tolerance (of bfloat16 forward passes).
    """
    for saved_by, other in ((1, 2), (2, 1)):
        learners = {ranks: start(config_with(ranks, zero_stage=stage, dtype=dtype)) for ranks in (1, 2)}
        learner = learners[saved_by]
        learner.train(entries, range(3))
        snapshot = learner.snapshot()
        expected = learner.train(entries, range(3, NUM_STEPS))
        # What a learner did before, more steps or fewer, is forgotten.
        learner.restore(snapshot)
        assert_same_curve(learner.train(entries, range(3, NUM_STEPS)), expected, 1e-6)
        learners[other].restore(snapshot)
        curve = learners[other].train(entries, range(3, NUM_STEPS))
        assert_same_curve(curve, expected, 1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize(("saved_by", "restored_by"), [((3, 2), (0, 1)), ((0, 1), (3, 2)), ((1, 2), (2, 2))])
def test_a_snapshot_continues_at_any_stage(
    start: Callable[..., Ranks], entries: list[Entry], saved_by: tuple[int, int], restored_by: tuple[int, int]
) -> None:
    def learner(stage: int, ranks: int) -> Ranks:
        return start(config_with(ranks, zero_stage=stage))

    writer = learner(*saved_by)
    writer.train(entries, range(3))
    snapshot = writer.snapshot()
    assert len(snapshot[1]) == saved_by[1]
    expected = writer.train(entries, range(3, NUM_STEPS))
    reader = learner(*restored_by)
    reader.restore(snapshot)
    assert_same_curve(reader.train(entries, range(3, NUM_STEPS)), expected, 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_snapshot_can_be_taken_before_the_first_step_and_gone_back_to(
    start: Callable[..., Ranks], entries: list[Entry], stage: int
) -> None:
    learner = start(config_with(2, zero_stage=stage))
    snapshot = learner.snapshot()
    assert snapshot[0]["steps"] == 0
    expected = learner.train(entries, range(2))
    learner.restore(snapshot)
    assert_same_curve(learner.train(entries, range(2)), expected, 1e-6)


def test_ranks_share_a_snapshot_and_a_tied_parameter_is_in_it_once(
    start: Callable[..., Ranks], entries: list[Entry], tiny_model: dict[str, Path]
) -> None:
    learner = start(config_with(2, zero_stage=3, dtype="bfloat16"))
    learner.train(entries, range(1))
    facts, parts = learner.snapshot()
    shares = ray.get(parts)
    arrays = {name: array for share in shares for name, array in share.items()}
    assert sum(map(len, shares)) == len(arrays), "an array was handed out twice"
    assert "weight/model.embed_tokens.weight" in arrays and "weight/lm_head.weight" not in arrays
    assert {array.dtype.name for name, array in arrays.items() if not name.startswith("rng/")} == {"float32"}
    assert all(list(arrays[f"exp_avg_sq/{name}"].shape) == shape for name, shape in facts["shapes"].items())
    sizes = [sum(array.size for array in share.values()) for share in shares]
    assert max(sizes) < 0.8 * sum(sizes)
    sent = learner.sent_weights()
    for name in facts["shapes"]:
        assert torch.equal(torch.tensor(arrays[f"weight/{name}"]).to(torch.bfloat16), sent[name])


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_snapshot_that_is_not_this_models_or_not_whole_is_refused(
    start: Callable[..., Ranks], entries: list[Entry], tiny_model: dict[str, Path], stage: int, ranks: int
) -> None:
    facts, parts = start(config_with(2, zero_stage=1)).snapshot()
    learner = start(config_with(ranks, zero_stage=stage), tiny_model["untied"])
    with pytest.raises(RunError, match=r"not this model's: lm_head.weight is missing; .* student\.path"):
        learner.restore((facts, parts))
    learner = start(config_with(ranks, zero_stage=stage))
    other = facts | {"shapes": facts["shapes"] | {"model.norm.weight": [7]}}
    with pytest.raises(RunError, match=r"model\.norm\.weight is \[7\] instead of \[\d+\]"):
        learner.restore((other, parts))
    with pytest.raises(RunError, match=r"lacks \d+ of its arrays, as weight/model"):
        learner.restore((facts, parts[:1]))
    with pytest.raises(RunError, match=r"lacks \d+ of its arrays, as exp_avg/model"):
        learner.restore((facts | {"steps": 3}, parts))


def test_random_generators_go_on_where_the_number_of_ranks_is_the_same(start: Callable[..., Ranks]) -> None:
    def draws(learner: Ranks) -> list[list[float]]:
        return learner.each("draw")

    pair = start(config_with(2))
    draws(pair)
    snapshot = pair.snapshot()
    expected = draws(pair)
    again = start(config_with(2))
    again.restore(snapshot)
    assert draws(again) == expected
    alone = start(config_with(1))
    alone.restore(snapshot)
    fresh = draws(alone)
    draws(alone)
    alone.restore(snapshot)
    assert draws(alone) == fresh and fresh[0] not in expected


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
    (size, files), *others = learner.call("export")
    assert others == [(0, {})] * (ranks - 1)
    assert size == sum(array.nbytes for array in files.values())
    (tmp_path / "exported").mkdir()
    for name, content in files.items():
        (tmp_path / "exported" / name).write_bytes(content.tobytes())

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


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_a_loss_that_is_not_finite_skips_the_step_on_every_rank_and_leaves_no_trace(
    start: Callable[..., Ranks], entries: list[Entry], stage: int, ranks: int
) -> None:
    """Weights, Adam's moments, gradients and learning rate: the steps after it equal those of a run without it."""
    config = config_with(ranks, zero_stage=stage, micro_batch_tokens=30)
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


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_payload_that_is_gone_is_named_by_every_rank_and_leaves_no_trace(
    start: Callable[..., Ranks], hosts: dict[int, list[Any]], entries: list[Entry], stage: int, ranks: int
) -> None:
    """Only one of the ranks is told to train on it; the other must not wait for it in the forward pass."""
    expected = start(config_with(ranks, zero_stage=stage)).train(entries, range(2))
    learner = start(config_with(ranks, zero_stage=stage))
    gone = ray.put(ray.get(entries[1].scores["teacher"]))
    ray.get([host.lose.remote([gone]) for host in hosts[ranks]])
    without = dataclasses.replace(entries[1], scores=entries[1].scores | {"teacher": gone})
    [outcome] = learner.outcomes([entries[0], without, *entries[2:]], range(1))
    assert (outcome.metrics, outcome.problem, outcome.lost) == ({}, None, (entries[1].meta.rollout_id,))
    assert_same_curve(learner.train(entries, range(2)), expected, 1e-6)


def test_a_payload_that_many_rollouts_share_is_fetched_once(ray_here: None, entries: list[Entry]) -> None:
    """Refs lose their identity on the way to an actor only if they are sent apart."""

    @ray.remote(num_cpus=0)
    def fetched(plan: StepPlan) -> int:
        sizes = []
        fetch_payloads(plan, lambda refs: sizes.append(len(refs)) or ray.get(refs))
        return sizes[0]

    plan = StepPlan(0, tuple((entry,) for entry in entries), count(entries), learner_ranks.COEFFICIENTS)
    assert ray.get(fetched.remote(plan)) == 7  # two payloads with two scores each, and the golden one


LOSSES = {
    "clipped policy gradient, k3 of the reference": {
        "student": {"divergence": "k1"},
        "importance": {"correction": "clip"},
        "reduction": "sequence",
        "reference": {"coef": 0.1, "estimator": "k3"},
    },
    "full vocabulary": {
        "student": {"divergence": "jsd", "support": "full"},
        "reference": {"coef": 0.1, "estimator": "full", "on_golden": True},
    },
    "loops": {"loop_advantage": -1.0},
    "student's top-k": {"student": {"divergence": "forward_kl", "support": "student_top_k", "tail": "stop_gradient"}},
}


@pytest.mark.parametrize(("stage", "ranks", "loss"), [(1, 2, "full vocabulary"), *((3, 2, loss) for loss in LOSSES)])
def test_every_kind_of_loss_trains_like_plain_torch(
    start: Callable[..., Ranks],
    teacher_checkpoint: Path,
    tiny_model: dict[str, Path],
    stage: int,
    ranks: int,
    loss: str,
) -> None:
    config = config_with(ranks, LOSSES[loss], zero_stage=stage, micro_batch_tokens=30)
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, path=str(teacher_checkpoint)))
    roles = ("teacher", "reference")
    paths = {"teacher": teacher_checkpoint, "reference": tiny_model["tied"]}
    scoring = Scoring(
        given=6,
        hidden=True,
        stop_token_ids=(1, 2),
        roles={"student": roles, "golden": roles},
        heads={role: load_head(path, torch.float32, torch.device("cpu")) for role, path in paths.items()},
    )
    made = partial(scored_entries, *SIZES, seed=3, scoring=scoring, looping=[2])
    expected = plain_training(config, tiny_model["tied"], made(), (1, 2))
    entries = made(put=ray.put)
    curve = start(config, stop_token_ids=(1, 2)).train(entries, range(NUM_STEPS))
    assert_same_curve(curve, expected, 1e-4)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_pieces_change_nothing_under_any_stage(
    start: Callable[..., Ranks], entries: list[Entry], expected_curve: list[dict[str, float]], stage: int, ranks: int
) -> None:
    """Two ranks have different numbers of pieces, one rank now and then none at all."""
    learner = start(config_with(ranks, zero_stage=stage, micro_batch_tokens=40))
    learner.cut(4)
    assert_same_curve(learner.train(entries, range(NUM_STEPS)), expected_curve, 1e-4)


LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize("estimator", ["top_k", "full"])
def test_adapters_train_alike_under_every_stage_and_the_base_is_the_reference(
    start: Callable[..., Ranks], entries: list[Entry], tiny_model: dict[str, Path], estimator: str
) -> None:
    """The yardstick is trained by plain torch with the scores of a reference scorer, a model of its own; of these the
    learner gets none that it could use."""
    loss = {"reference": {"coef": 0.5, "estimator": estimator, "on_golden": True}}
    config = config_with(loss=loss, lora=LORA, lr=2e-2)
    scored = learner_ranks.scored_by_reference(scored_entries(*SIZES, seed=3), config, tiny_model["tied"])
    expected = plain_training(config, tiny_model["tied"], scored)
    assert expected[-1]["loss_reference"] > 0.01, "training does not leave the reference"
    for stage, ranks in [(0, 1), (2, 2), (3, 2)] if estimator == "top_k" else [(0, 1)]:
        ways = {"packing": False, "gradient_checkpointing": True} if stage == 2 else {}
        config = config_with(ranks, loss, LORA, zero_stage=stage, micro_batch_tokens=30, lr=2e-2, **ways)
        learner = start(config)
        curve = learner.train(without_reference(entries), range(NUM_STEPS))
        assert_same_curve(curve, expected, 1e-4)
        for got, wanted in zip(curve, expected, strict=True):
            assert got["reference_logprob"] == pytest.approx(wanted["reference_logprob"], abs=1e-5)


def without_reference(entries: Sequence[Entry]) -> list[Entry]:
    kept = [{role: ref for role, ref in entry.scores.items() if role != "reference"} for entry in entries]
    return [dataclasses.replace(entry, scores=scores) for entry, scores in zip(entries, kept, strict=True)]


@pytest.mark.parametrize(("saved_by", "restored_by"), [((0, 1), (0, 1)), ((3, 2), (1, 2))])
def test_a_snapshot_holds_the_adapters_alone_and_continues_at_any_stage(
    start: Callable[..., Ranks], entries: list[Entry], saved_by: tuple[int, int], restored_by: tuple[int, int]
) -> None:
    def learner(stage: int, ranks: int) -> Ranks:
        return start(config_with(ranks, lora=LORA, zero_stage=stage, lr=2e-2))

    writer = learner(*saved_by)
    writer.train(entries, range(3))
    facts, parts = snapshot = writer.snapshot()
    arrays = {name for share in ray.get(parts) for name in share if not name.startswith("rng")}
    assert len(arrays) == 3 * len(facts["shapes"]) == 3 * 28 and all("lora" in name for name in facts["shapes"])
    expected = writer.train(entries, range(3, NUM_STEPS))
    reader = learner(*restored_by)
    reader.restore(snapshot)
    curve = reader.train(entries, range(3, NUM_STEPS))
    assert_same_curve(curve, expected, 1e-6 if saved_by == restored_by else 1e-4)
    with pytest.raises(RunError, match=r"not this model's: model\.embed_tokens\.weight is missing"):
        start(config_with(1)).restore(snapshot)


@pytest.mark.parametrize(("stage", "ranks", "dtype"), [(0, 1, "float32"), (3, 2, "bfloat16")])
def test_adapters_are_sent_alone_and_exported_merged_and_beside_it(
    start: Callable[..., Ranks],
    entries: list[Entry],
    tiny_model: dict[str, Path],
    tmp_path: Path,
    stage: int,
    ranks: int,
    dtype: str,
) -> None:
    from peft import PeftModel

    source = tiny_model["tied"]
    learner = start(config_with(ranks, lora=LORA, zero_stage=stage, dtype=dtype, lr=2e-2))
    learner.train(entries, range(3))
    sent, manifest = learner.sent_weights(), learner.call("manifest", 3)[0]
    assert len(sent) == 28 and (manifest.base, manifest.scale) == (str(source), 2.0)
    assert {str(tensor.dtype) for tensor in sent.values()} == {f"torch.{dtype}"}
    received = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    before = received(torch.arange(8)[None]).logits
    received.load_state_dict(dict(merged(read_weights(str(source)), sent, 2.0)), strict=False)
    after = received(torch.arange(8)[None]).logits
    assert (after - before).abs().max() > 0.05, "training changed nothing"

    (_, files), *_ = learner.call("export")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.tobytes())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(exported(torch.arange(8)[None]).logits, after)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter")
    assert (alone(torch.arange(8)[None]).logits - after).abs().max() < 1e-4
    assert alone.peft_config["default"].base_model_name_or_path == str(source)


def test_a_second_run_in_a_process_is_that_of_a_fresh_one(
    start: Callable[..., Ranks], entries: list[Entry], tiny_model: dict[str, Path]
) -> None:
    first = config_with(1, {"student": {"divergence": "k1"}}, zero_stage=1, lr=1e-2, dtype="bfloat16")
    start(first, tiny_model["untied"]).train(entries, range(2))
    config = config_with(1, zero_stage=3)
    second = start(config).train(entries, range(2))
    [fresh] = make_hosts(1)
    assert Ranks([fresh], config, tiny_model["tied"], (1,)).train(entries, range(2)) == second
    ray.kill(fresh)


@pytest.mark.parametrize(("stage", "ranks", "dtype"), [(0, 2, "float32"), (2, 2, "float32"), (3, 2, "bfloat16")])
def test_an_older_snapshot_can_be_gone_back_to_in_the_middle_of_a_run(
    start: Callable[..., Ranks], entries: list[Entry], stage: int, ranks: int, dtype: str
) -> None:
    """Also from a step that was not taken: what follows equals what followed the first time."""
    learner = start(config_with(ranks, zero_stage=stage, dtype=dtype))
    learner.train(entries, range(2))
    snapshot = learner.snapshot()
    expected = learner.train(entries, range(2, NUM_STEPS))
    [outcome] = learner.outcomes([entries[0], poison(entries[1]), *entries[2:]], range(NUM_STEPS, NUM_STEPS + 1))
    assert outcome.problem
    after_skipped = learner.snapshot()[0]
    assert (after_skipped["steps"], after_skipped["lr_step"]) == (NUM_STEPS, NUM_STEPS)
    learner.restore(snapshot)
    assert_same_curve(learner.train(entries, range(2, NUM_STEPS)), expected, 1e-6)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_joiner_gets_the_weights_in_a_group_of_its_own(
    start: Callable[..., Ranks], entries: list[Entry], stage: int, ranks: int
) -> None:
    """The others' group stays as it is; a joiner that does not come costs the learner nothing but the wait."""
    expected = start(config_with(ranks, zero_stage=stage)).train(entries, range(2))
    learner = start(config_with(ranks, zero_stage=stage))
    sent = learner.sent_weights()
    manifest = learner.call("manifest", 1)[0]

    def take(receiver: WeightTransfer) -> None:
        got = dict(receiver.receive(manifest))
        assert all(torch.equal(got[name], sent[name]) for name in sent)

    members, joiner = WeightTransfer(), WeightTransfer()
    main, own = transfer_group(2), transfer_group(2)
    opening = learner.begin_call("open_transport", main)
    members.connect(dataclasses.replace(main, rank=1))
    ray.get(opening)
    sending = learner.begin_call("send_weights", manifest, own)
    joiner.connect(dataclasses.replace(own, rank=1))
    take(joiner)
    ray.get(sending)
    with pytest.raises(WeightSyncError, match="rank 0 of 2 could not join"):
        learner.call("send_weights", manifest, transfer_group(2, timeout_s=1.0))
    sending = learner.begin_call("send_weights", manifest)
    take(members)
    ray.get(sending)
    assert_same_curve(learner.train(entries, range(2)), expected, 1e-6)


def transfer_group(world_size: int, timeout_s: float = 30.0) -> TransferGroup:
    return TransferGroup("gloo", "127.0.0.1", free_port(), 0, world_size, timeout_s, 2**12, "5ec2e7")


def test_a_learner_at_work_answers_in_its_second_thread(start: Callable[..., Ranks], hosts) -> None:
    start(config_with(1))
    [host] = hosts[1]
    busy = host.wait.remote()
    assert ray.get(host.call.options(concurrency_group="io").remote("node"), timeout=30)
    other = ray.get(host.go_on.options(concurrency_group="io").remote())
    name, num_threads = ray.get(busy)
    assert other != name and num_threads == 1
