"""Sequences of a packed row: each is what it is alone, and nothing is as large as all of them against all."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_ray.config import from_dict
from opd_ray.errors import InputError
from opd_ray.learn.heads import ResponseModel
from opd_ray.models import attention
from opd_ray.models.inputs import lay_out

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
LENGTHS = (9, 9, 1, 14, 2, 5, 5, 5, 9)
"""Some of one length, beside each other and elsewhere."""
WINDOW = 4


def model(kind: str, *, packing: bool) -> ResponseModel:
    torch.manual_seed(0)
    learner = from_dict({"learner": {"packing": packing}}).learner
    shared = {"vocab_size": 24, "num_key_value_heads": 2, "initializer_range": 0.2} | SIZES
    shared["attn_implementation"] = attention.implementation(learner, torch.device("cpu"))
    if kind == "windowed":
        causal_lm = MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **shared))
    else:
        causal_lm = Qwen3ForCausalLM(Qwen3Config(**shared))
    return ResponseModel(causal_lm, packing=packing)


def states(module: ResponseModel, responses: Sequence[np.ndarray], packing: bool) -> torch.Tensor:
    """The body's, where they predict the response tokens of sequences with a prompt of three tokens."""
    prompts = [response[:1].repeat(3) for response in responses]
    found = []
    module.consume(lambda hidden, head: found.append(hidden) or hidden.sum())
    module(*lay_out(prompts, responses, packing=packing))
    return found[0]


@pytest.fixture
def responses() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 24, length) for length in LENGTHS]


@pytest.mark.parametrize("kind", ["full", "windowed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("most_padded", [0, 60, 4096])
def test_a_packed_sequence_is_what_it_is_alone_and_so_is_its_gradient(
    monkeypatch: pytest.MonkeyPatch, responses: list[np.ndarray], kind: str, checkpointing: bool, most_padded: int
) -> None:
    """With a layer that looks back four tokens, too, and where activations are made again in the backward pass; in a
    batch for each length, in a few, and in one."""
    monkeypatch.setattr(attention, "_MOST_PADDED", most_padded)
    packed, padded = model(kind, packing=True), model(kind, packing=False)
    if checkpointing:
        packed.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        packed.train()
    alone = torch.cat([states(padded, [response], packing=False) for response in responses])
    together = states(packed, responses, packing=True)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    (alone * weights).sum().backward()
    (together * weights).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), padded.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_sequences_of_about_one_length_are_a_batch_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MOST_PADDED", 6)
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3]])
    batches = attention.row_bounds(position_ids, "opd_ray_packed")["batches"]
    assert batches.shapes == ((2, 5), (2, 2))
    assert batches.taken.tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11, 8, 0, 1, 7, 7]
    assert batches.padding.flatten().nonzero().flatten().tolist() == [9, 13]
    assert batches.taken[batches.place].tolist() == list(range(12))


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had which was made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


def test_no_tensor_of_a_packed_row_grows_with_the_square_of_it() -> None:
    """The bug: 16 thousand packed tokens had a mask of 16 thousand squared, 64 thousand ran out of memory."""
    responses = [np.arange(64) % 24] * 32
    largest = {}
    for rows in (8, 32):
        with torch.no_grad(), Largest() as seen:
            states(model("full", packing=True), responses[:rows], packing=True)
        largest[rows] = seen.elements
    assert largest[32] <= 4.1 * largest[8]
    assert largest[32] < (32 * 64) ** 2 / 8


def test_an_architecture_that_does_not_keep_sequences_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose layers do not hand the bounds on to their attention trained on rows that saw each other."""
    monkeypatch.setattr(attention, "row_bounds", lambda *_: {})
    with pytest.raises(InputError, match=r"sequences in one row see each other in Qwen3ForCausalLM .*packing=false"):
        model("full", packing=True)


@pytest.mark.parametrize(
    ("device", "there", "settings", "expected"),
    [
        ("cpu", True, {}, "opd_ray_packed"),
        ("cpu", True, {"packing": False}, "sdpa"),
        ("cuda", False, {"dtype": "bfloat16"}, "opd_ray_packed"),
        ("cuda", True, {"dtype": "bfloat16"}, "flash_attention_2"),
        ("cuda", True, {"dtype": "float32", "packing": False}, "sdpa"),
        ("cuda", True, {"dtype": "bfloat16", "attention": "sdpa", "packing": False}, "sdpa"),
        ("cuda", False, {"dtype": "bfloat16", "attention": "flash", "gpus_per_rank": 1}, "flash_attention_2"),
    ],
)
def test_flash_attention_is_taken_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, device: str, there: bool, settings: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: there)
    learner = from_dict({"learner": settings}).learner
    assert attention.implementation(learner, torch.device(device)) == expected


def test_flash_attention_is_told_where_each_sequence_begins_on_the_rows_device() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1]])
    bounds = SimpleNamespace(**attention.row_bounds(position_ids, "flash_attention_2"))
    assert bounds.cu_seq_lens_q.tolist() == bounds.cu_seq_lens_k.tolist() == [0, 3, 4, 6]
    assert bounds.cu_seq_lens_q.dtype == torch.int32 and bounds.cu_seq_lens_q.device == position_ids.device
    assert bounds.max_length_q == bounds.max_length_k == 3
