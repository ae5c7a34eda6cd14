"""The torch engine's key-value cache: whatever comes and goes, each row goes on as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch

from opd_ray.generate import columns
from opd_ray.generate.columns import Columns

VOCABULARY = 32


@pytest.fixture(scope="module", params=["as many heads", "shared heads, sliding window"])
def model(request, tiny_model):
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    if request.param == "as many heads":
        return AutoModelForCausalLM.from_pretrained(tiny_model["untied"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()


def last_logits(model, rows: list[list[int]]) -> torch.Tensor:
    """[rows, vocabulary] after the last token of each row, by one forward pass: none attends to the padding behind."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return model(padded).logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]


@pytest.mark.parametrize("first", [4, 16, 128])
@torch.inference_mode()
def test_rows_that_come_and_go_have_the_logits_of_a_forward_pass(model, monkeypatch, first: int) -> None:
    """With little room at the beginning, so that it is outgrown and moved about; at times nobody is left."""
    monkeypatch.setattr(columns, "_FIRST_COLUMNS", first)
    rng, most = random.Random(first), 6
    cache, rows = Columns(model, most), []
    cache.enter([torch.tensor([1])], 0)  # room for one

    def tokens(number: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(number)]

    for turn in range(60):
        logits = []
        if rows:
            new = tokens(len(rows))
            logits.append(cache.extend(torch.tensor(new)))
            rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        if entering := [tokens(rng.randint(1, 30)) for _ in range(rng.randint(0, most - len(rows)))]:
            logits.append(cache.enter([torch.tensor(each) for each in entering], len(rows)))
            rows += entering
        if rows:
            torch.testing.assert_close(torch.cat(logits), last_logits(model, rows), atol=1e-5, rtol=1e-4)
        share = 1.0 if turn % 20 == 19 else 0.3
        gone = [row for row, each in enumerate(rows) if rng.random() < share or len(each) > 60]
        was = cache.leave(gone, len(rows))
        assert sorted(was) == [row for row in range(len(rows)) if row not in gone]
        rows = [rows[row] for row in was]


@torch.inference_mode()
def test_prefixes_are_computed_anew_in_place_of_what_was_there(model) -> None:
    """As after a weight update: rows are entered from the first one on, over what older weights left."""
    cache = Columns(model, 3)
    cache.enter([torch.tensor([1, 2, 3]), torch.tensor([4])], 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    got = cache.enter([torch.tensor([5, 6]), torch.tensor([7, 8, 9, 10])], 0)
    for row, logits in zip(([5, 6], [7, 8, 9, 10]), got, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0, -1], atol=1e-5, rtol=1e-4)
