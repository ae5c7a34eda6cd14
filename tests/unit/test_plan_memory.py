"""The plan's arithmetic against cases done by hand, and against sizes that are known from elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from known_models import QWEN3_1B7, QWEN25_1B5, QWEN25_7B, SMOLLM2_135M, TINY
from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.models.size import ModelSize, size_of
from opd_ray.plan import flow, memory, show
from opd_ray.plan.outlook import Outlook

RECIPES = Path(__file__).parents[2] / "opd_ray" / "recipes"
GB = 1e9


def made(*overrides: str) -> Config:
    return configs.load(None, list(overrides))


def sizes_for(config: Config, student: ModelSize = TINY, other: ModelSize = TINY) -> dict[str, ModelSize]:
    return {"student": student, "teacher": other, "reference": student} | dict.fromkeys(config.scorers, other)


# ---- models ----


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(QWEN25_1B5, 1.5437e9), (QWEN25_7B, 7.6156e9), (QWEN3_1B7, 1.7206e9), (SMOLLM2_135M, 134.5e6)],
)
def test_the_parameters_of_known_models_follow_from_their_shape(model: ModelSize, parameters: float) -> None:
    """Numbers of their safetensors on the Hub; what is left out (biases of Qwen2.5's attention) is below .1 %."""
    assert model.parameters == pytest.approx(parameters, rel=1e-3)


def decoder(**more: object) -> SimpleNamespace:
    shape = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SimpleNamespace(**shape, intermediate_size=16, **more)


def save(directory: Path, precision: type) -> Path:
    directory.mkdir()
    save_file({"model.norm.weight": np.zeros(8, precision)}, directory / "a.safetensors")
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_in_the_headers_and_a_tied_output_layer_once(tmp_path: Path, tied: bool) -> None:
    """The adversary: a checkpoint that saved its tied output layer beside the embedding."""
    embedding = np.zeros((10, 8), np.float32)
    save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}, tmp_path / "a.safetensors")
    save_file({"model.norm.weight": np.zeros(8, np.float16)}, tmp_path / "b.safetensors")
    found = size_of(decoder(tie_word_embeddings=tied, num_key_value_heads=1), tmp_path)
    assert found.parameters == (88 if tied else 168)
    assert (found.num_kv_heads, found.head_dim, found.tied) == (1, 4, tied)
    assert found.stored_bytes == 0, "two precisions"
    assert size_of(decoder(), save(tmp_path / "one", np.float16)).stored_bytes == 2


def test_without_its_files_a_model_has_the_parameters_of_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    # 80 embedding, 80 output, 2 layers of (2·8·(2+2)·4 + 3·8·16 + 16), 8 of the last norm
    assert size_of(decoder(), "nobody/nothing").parameters == 80 + 80 + 2 * (256 + 384 + 16) + 8


# ---- bytes of a step ----


def paper_step() -> tuple[Config, flow.Step]:
    config = configs.load(RECIPES / "paper_stableopd_7b.yaml")
    return config, flow.Step({"student": 64 * 4}, 512, 8192)


def score_bytes(*overrides: str) -> float:
    config, step = paper_step()
    config = configs.load(RECIPES / "paper_stableopd_7b.yaml", overrides)
    return flow.store_bytes(config, step, sizes_for(config, QWEN25_7B, QWEN25_7B), (1,))["teacher"]


def test_a_steps_bytes_are_those_of_design() -> None:
    """DESIGN §6, 64 × 4 × 8,192 tokens: sampled token 17 MB, top-64 1.07 GB, full vocabulary as fp16 states 15 GB."""
    on_support = ("loss.student.divergence=reverse_kl", "loss.importance.correction=none")
    assert score_bytes() == pytest.approx(17e6, rel=0.02)
    assert score_bytes(*on_support) == pytest.approx(1.07 * GB + 17e6, rel=0.01)
    assert score_bytes(*on_support, "loss.student.support=full") == pytest.approx(15.03 * GB + 17e6, rel=0.01)


def test_a_rollout_carries_what_its_columns_say() -> None:
    config = made("rollout.responses_per_prompt=2", "loss.student.support=student_top_k", "loss.student.top_k=4")
    step = flow.Step({"student": 3, "golden": 2}, 5, 7)
    found = flow.store_bytes(config, step, sizes_for(config), (1,))
    # student: tokens, text, log-probs and versions 4 each, ids of 4 alternatives; golden: tokens and text
    assert found["rollouts"] == 3 * 7 * (16 + 16) + 2 * 7 * 8 + 5 * 5 * 4
    # teacher, student rollouts alone: sampled 4, stop 4, its own 4 alternatives 8 each, the student's 4 given ones
    assert found["teacher"] == 3 * 7 * (4 + 4 + 32 + 16)


def test_the_largest_step_is_every_schedules_highest() -> None:
    config = made("rollout.max_response_tokens=[[0,10],[9,70]]", "buffer.golden_per_prompt=[[0,2],[9,0]]")
    step = flow.largest_step(config, 6)
    assert (step.rollouts, step.sequence_tokens) == ({"student": 32, "golden": 64}, 76)
    assert (step.student_tokens, step.trained_tokens) == (32 * 70, 96 * 70)


@pytest.mark.parametrize(
    ("horizon", "trained", "sampled"),
    [
        ("20", 20, 4 * (8 * 70 + 24 * 20)),
        ("[[0,5],[4,25]]", 25, 4 * (8 * 70 + 24 * 25)),
        ("[[0,90],[4,30]]", 70, 4 * 32 * 70),  # at the first step all have their budget
    ],
)
def test_a_horizon_leaves_fewer_tokens_of_the_students_and_probes_their_budget(horizon, trained, sampled) -> None:
    settings = ["rollout.max_response_tokens=70", "rollout.responses_per_prompt=4", "buffer.golden_per_prompt=2"]
    config = made(*settings, f"rollout.horizon={horizon}")
    step = flow.largest_step(config, 6)
    assert flow.horizon(config) == flow.Horizon(8, trained, sampled)
    assert (step.student_tokens, step.trained_tokens) == (128 * trained, 128 * trained + 64 * 70)
    assert step.sequence_tokens == 76, "a probe has room for all of it"
    assert flow.horizon(made(*settings)) is None
    ahead = Outlook(step, flow.horizon(config), (), {}, {}, 0, 1, 9, 64, 2.0)
    show.flow(Console(file=(said := io.StringIO()), soft_wrap=True), ahead)
    assert f"at most {sampled:,} tokens a step" in said.getvalue()
    assert f"{128 * trained + 64 * 70:,} response tokens\n" in said.getvalue()


def test_a_tied_output_layer_is_sent_once() -> None:
    assert flow.broadcast_bytes(made(), replace(TINY, tied=True)) == 4 * 1000
    assert flow.broadcast_bytes(made("learner.dtype=bfloat16"), TINY) == 2 * 1000


# ---- memory ----


def test_adapters_take_gradients_moments_and_snapshots_of_their_own_size_alone() -> None:
    """And the whole vocabulary is compared with the base in the learner, which no scorer has a size for."""
    config = made("student.lora.rank=4", "loss.reference.estimator=full", "learner.zero_stage=2", "learner.num_ranks=2")
    size, step = replace(QWEN3_1B7, adapters=0), flow.Step({"student": 8}, 10, 90)
    with_adapters = size.with_adapters(config.student.lora)
    sizes = {"student": with_adapters, "teacher": TINY}
    whole, few = (memory.learner(config, each, sizes, step).parts for each in (size, with_adapters))
    assert with_adapters.adapters < 0.005 * size.parameters
    for name in ("gradients", "optimizer"):
        assert few[name] < 0.005 * whole[name]
    assert few["weights"] == pytest.approx(whole["weights"] + 4 * with_adapters.adapters), "of other files, so its own"
    assert few["scorers' output layers"] == 4 * size.head_parameters


def test_a_snapshot_is_that_of_design() -> None:
    """DESIGN §6: 20.6 GB at 1.7 B, 91 GB at 7.6 B."""
    assert memory.snapshot_bytes(QWEN3_1B7) == pytest.approx(20.6 * GB, rel=0.005)
    assert memory.snapshot_bytes(QWEN25_7B) == pytest.approx(91 * GB, rel=0.005)


def test_the_papers_7b_on_four_h200_is_that_of_design() -> None:
    """DESIGN §6: learner ranks ~92 GB each, generator ~122 (.85 of a card of 143.8), teacher and reference ~43."""
    config, _ = paper_step()
    step = flow.largest_step(config, 1024)
    found = {each.room: each for each in memory.processes(config, sizes_for(config, QWEN25_7B, QWEN25_7B), step, 9216)}
    assert found["learn"].bytes == pytest.approx(92 * GB, rel=0.05)
    assert found["generate"].takes_share * 143.8 == pytest.approx(122, rel=0.01)
    assert found["teacher"].bytes + found["reference"].bytes == pytest.approx(43 * GB, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "expected"),
    [
        (1, 0, "float32", {"weights": 4000, "gradients": 4000, "optimizer": 8000}),
        (2, 1, "float32", {"weights": 4000, "gradients": 4000, "optimizer": 6000}),
        (2, 2, "float32", {"weights": 4000, "gradients": 2000, "optimizer": 6000}),
        (2, 0, "bfloat16", {"weights": 2000, "gradients": 6000, "optimizer": 6000}),
        (2, 2, "bfloat16", {"weights": 2000, "gradients": 2000, "optimizer": 6000}),
        (4, 3, "bfloat16", {"weights": 500 + 2000, "gradients": 1000, "optimizer": 3000}),
    ],
)
def test_what_a_rank_keeps_by_zero_stage(ranks: int, stage: int, dtype: str, expected: dict[str, float]) -> None:
    """1000 parameters: Rajbhandari et al., figure 1, with gradients summed in float32."""
    config = made(f"learner.num_ranks={ranks}", f"learner.zero_stage={stage}", f"learner.dtype={dtype}")
    parts = memory.learner(config, TINY, sizes_for(config), flow.Step({"student": 1}, 2, 2)).parts
    assert {name: parts[name] for name in expected} == expected


def test_activations_by_hand() -> None:
    """Two layers of 4·(6·8 + 13·4 + 4·16) bytes a token and one that works; checkpointed, two inputs of 4·8 and three
    layers."""
    step, layer = flow.Step({"student": 2}, 3, 2), 4 * (48 + 52 + 64)
    plain, again = made(), made("learner.gradient_checkpointing=true")
    assert memory.activation_bytes(plain.learner, TINY, step) == 10 * 3 * layer
    assert memory.activation_bytes(again.learner, TINY, step) == 10 * (2 * 32 + 3 * layer)


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        ((), 4),
        (("loss.reference.coef=0",), 3),
        (("loss.reference.coef=0", "loss.student.support=full"), 3),
        (("loss.reference.coef=0", "loss.student.support=full", "loss.student.divergence=forward_kl"), 6),
        (("loss.reference.coef=0", "loss.student.support=full", "loss.student.divergence=jsd"), 9),
        (("loss.reference.estimator=full",), 4),
    ],
)
def test_the_loss_holds_so_many_copies_of_its_logits(overrides: tuple[str, ...], copies: int) -> None:
    """As measured: peaks of one backward pass over 512 x 49,152 logits. Half of 40 tokens are responses."""
    config, step = made(*overrides), flow.Step({"student": 10}, 2, 2)
    states = 20 * 4 * (2 * 8 + (8 if "full" in " ".join(overrides) else 0))
    assert memory.loss_bytes(config, sizes_for(config), step) == copies * 4 * 20 * 10 + states + 60 * 20


def test_a_loss_in_pieces_holds_one_piece_and_the_output_layers_gradient() -> None:
    config, large = made("learner.logits_mb=1", "loss.reference.coef=0"), replace(TINY, vocab_size=2**20)
    found = memory.loss_bytes(config, sizes_for(config, large), flow.Step({"student": 1}, 1, 3))
    assert found == 3 * 2**20 + 8 * 8 * 2**20 + 3 * 4 * 16 + 60 * 3


def test_packed_rows_take_what_padded_ones_of_as_many_tokens_do() -> None:
    """There is no mask of every position against every other (opd_ray.models.attention)."""
    step = flow.Step({"student": 1000}, 8, 8)
    packed, padded = (made(f"learner.packing={packing}").learner for packing in (True, False))
    assert memory.activation_bytes(packed, TINY, step) == memory.activation_bytes(padded, TINY, step)


def test_a_rollout_longer_than_a_micro_batch_is_one_of_its_own() -> None:
    settings = made("learner.micro_batch_tokens=16").learner
    assert memory.micro_batch_tokens(settings, flow.Step({"student": 4}, 10, 20)) == 30
    assert memory.micro_batch_tokens(settings, flow.Step({"student": 4}, 1, 2)) == 12, "no more than a step has"


def test_the_phases_of_a_step_come_one_after_another() -> None:
    """A snapshot's copy is made when activations are gone: the larger counts, not their sum."""
    step = flow.Step({"student": 1}, 1, 1)
    large = replace(TINY, parameters=10**9)
    assert "snapshot's copy" in memory.learner(made(), large, sizes_for(made()), step).parts
    assert "activations" not in memory.learner(made(), large, sizes_for(made()), step).parts
    never = made("checkpoint.every_steps=0", "checkpoint.memory_every_steps=0")
    assert "activations" in memory.learner(never, large, sizes_for(never), step).parts


def test_two_snapshots_are_alive_in_the_store() -> None:
    config, step = made("buffer.max_staleness=1"), flow.Step({"student": 1}, 1, 1)
    payload = sum(flow.store_bytes(config, step, sizes_for(config), (1,)).values())
    assert memory.object_store(config, sizes_for(config), step, (1,)) == {
        "rollouts and scores": 3 * payload,
        "snapshots": 2 * 12 * 1000 + payload,
    }
    none = made("checkpoint.memory_every_steps=0", "checkpoint.every_steps=0")
    assert "snapshots" not in memory.object_store(none, sizes_for(none), step, (1,))


def scorers_of(*overrides: str, stored_bytes: int = 4) -> dict[str, dict[str, float]]:
    """Parts of "teacher" and "reference" on one checkpoint, one call of 8 prompts a step of 32 and 32 golden ones."""
    config = made("teacher.path=/same", "reference.path=/same", *overrides)
    sizes = dict.fromkeys(("student", "teacher", "reference"), replace(TINY, stored_bytes=stored_bytes))
    found = memory.processes(config, sizes, flow.Step({"student": 32, "golden": 4}, 6, 2), 64)
    return {each.room: dict(each.parts) for each in found}


def test_scorers_on_the_same_files_share_them_and_others_do_not() -> None:
    """As measured with SmolLM2: two scorers of 538 MB took .79 GB each, and not 1.8."""
    assert [scorers_of()[role]["weights"] for role in ("teacher", "reference")] == [2000, 2000]
    assert scorers_of(stored_bytes=2)["teacher"]["weights"] == 4000, "cast, and so its own"
    assert scorers_of("reference.update=periodic")["teacher"]["weights"] == 4000, "the other one changes its copy"


@pytest.mark.parametrize(("more", "rooms"), [((), 2), (("learner.dtype=bfloat16",), 1), (("learner.zero_stage=3",), 1)])
def test_a_learner_of_adapters_shares_the_files_of_its_base(more: tuple[str, ...], rooms: int) -> None:
    """As measured with SmolLM2: nothing writes to the base, so a teacher of 538 MB took .76 GiB beside it, not 1.01."""
    config = made("teacher.path=student", "student.lora.rank=4", *more)
    assert config.learner_is_reference
    size = replace(TINY, stored_bytes=4).with_adapters(config.student.lora)
    found = memory.processes(config, {"student": size, "teacher": size}, flow.Step({"student": 1}, 1, 1), 64)
    parts = {each.room: each.parts for each in found}
    assert parts["teacher"]["weights"] == 4000 / rooms
    if not more:
        assert parts["learn"]["weights"] == 4 * (1000 / 2 + size.adapters)


def test_a_learner_of_adapters_takes_what_came_with_smollm2() -> None:
    """A rank alone with its base, 1,904 tokens in the largest micro-batch: 6.33 GB at the peak of its backward pass.
    Without the places that stay empty in the heap it would be 4.9."""
    config = made("student.lora.rank=16", "teacher.path=/t", "loss.student.top_k=32", "checkpoint.every_steps=0")
    size = SMOLLM2_135M.with_adapters(config.student.lora)
    step = flow.Step({"student": 19}, 55, 45)
    found = memory.learner(config, size, {"student": size, "teacher": size}, step)
    assert found.bytes == pytest.approx(6.33 * GB, rel=0.05)
    on_gpu = made("student.lora.rank=16", "learner.gpus_per_rank=1", "learner.dtype=float32")
    few, whole = (memory.activation_bytes(on_gpu.learner, each, step) for each in (size, SMOLLM2_135M))
    assert few == whole, "PyTorch's own allocator there"


def test_a_scorer_has_no_more_than_one_call_before_it() -> None:
    """8 rollouts of 8 tokens, a quarter of them responses."""
    parts = scorers_of("rollout.prompts_per_call=8")["teacher"]
    assert parts["activations"] == 64 * (4 * (16 + 48) + 64)
    assert parts["logits"] == 3 * 4 * 16 * 10
    assert scorers_of("teacher.max_batch_tokens=32")["teacher"]["activations"] == 32 * (4 * (16 + 48) + 64)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_teacher_behind_a_url_takes_no_memory_for_its_model(dtype: str) -> None:
    config = made("teacher.url=http://one:8000", f"teacher.dtype={dtype}", "teacher.num_actors=3")
    step = flow.Step({"student": 32, "golden": 4}, 6, 2)
    [client] = (
        each
        for each in memory.processes(config, sizes_for(config, other=QWEN25_7B), step, 256)
        if each.room == "teacher"
    )
    assert client.parts.keys() == {"process"} and client.host_bytes < 0.2 * GB and client.number == 3
    assert "scorers' output layers" not in memory.learner(config, TINY, sizes_for(config), step).parts


def test_a_generator_on_a_cpu_holds_its_weights_several_times() -> None:
    parts = scorers_of("rollout.engine=vllm", "rollout.kv_cache_bytes=5000")["generate"]
    assert (parts["weights"], parts["weights repacked and coming in"], parts["key-value cache"]) == (4000, 10000, 5000)
    for engine in ("torch", "auto"):  # which is torch at this size
        assert scorers_of(f"rollout.engine={engine}")["generate"]["weights coming in"] == 4000
