"""The torch engine's forward passes and their key-value cache: whatever comes and goes, each row goes on as if it were
alone."""

from __future__ import annotations

import random

import pytest
import torch

from opd_ray.generate import columns, plain
from opd_ray.generate.any_model import AnyModel
from opd_ray.generate.plain import PlainModel, is_plain

VOCABULARY = 32
NOTHING = torch.empty(0, dtype=torch.int64)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _random(kind: str):
    import transformers

    torch.manual_seed(0)
    if kind == "Mistral":
        own = {"head_dim": 8, "sliding_window": 12}
    elif kind == "Qwen2":
        own = {"tie_word_embeddings": True}
    else:
        rotation = LLAMA3 | {"original_max_position_embeddings": 8}
        own = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rotation}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **SHARED, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight") and "layernorm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # biases, too
    return model


PAIRS = [(kind, passes) for kind in ("Qwen3", "Qwen2", "Llama") for passes in (AnyModel, PlainModel)]


@pytest.fixture(
    scope="module", params=[*PAIRS, ("Mistral", AnyModel)], ids=lambda pair: f"{pair[0]}-{pair[1].__name__}"
)
def subject(request, tiny_model):
    """A model and its passes: as many heads for keys as for queries or fewer, tied or not, with biases, scaled
    rotations, layers that look back a window."""
    from transformers import AutoModelForCausalLM

    kind, passes = request.param
    if kind == "Qwen3":
        model = AutoModelForCausalLM.from_pretrained(tiny_model["untied"], dtype=torch.float32).eval()
    else:
        model = _random(kind)
    assert is_plain(model) == (kind != "Mistral")
    return model, passes


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
        ("Qwen3", {"dtype": torch.bfloat16}),
        ("Qwen3", {"adapters": True}),
        ("Qwen3", {}),
    ],
)
def test_what_is_not_written_out_goes_through_transformers(kind: str, own: dict) -> None:
    """The bug: a checkpoint with adapters beside its weights was taken for plain, and generated as if it had none."""
    import transformers

    own = dict(own)
    adapters, dtype = own.pop("adapters", False), own.pop("dtype", torch.float32)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **SHARED, head_dim=8, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    if adapters:
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(target_modules=["down_proj"]))
    assert is_plain(model) == (not own and dtype == torch.float32 and not adapters)


def last_logits(model, rows: list[list[int]]) -> torch.Tensor:
    """[rows, vocabulary] after the last token of each row, by one forward pass: none attends to the padding behind."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return model(padded).logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]


@pytest.mark.parametrize("first", [4, 128])
@torch.inference_mode()
def test_rows_that_come_and_go_have_the_logits_of_a_forward_pass(subject, monkeypatch, first: int) -> None:
    """With little room at the beginning, so that it is outgrown and moved about, and rows in groups of two, each of
    which is a call if it is the first's turn; at times nobody is left."""
    monkeypatch.setattr(columns, "_FIRST_COLUMNS", first)
    for module in (columns, plain):
        monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(plain, "_PADDING_BYTES", 0 if first == 4 else 1000)
    rng, most = random.Random(first), 6
    model, passes = subject
    cache, rows = passes(model, most), []
    cache.advance(NOTHING, [torch.tensor([1])])  # room for one

    def tokens(number: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(number)]

    for turn in range(40):
        new = tokens(len(rows))
        entering = [tokens(rng.randint(1, 30)) for _ in range(rng.randint(0, most - len(rows)))]
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)] + entering
        if not rows:
            continue
        entered = [torch.tensor(each) for each in entering]
        got = cache.advance(torch.tensor(new, dtype=torch.int64), entered)
        torch.testing.assert_close(got, last_logits(model, rows), atol=1e-4, rtol=1e-4)
        share = 1.0 if turn % 20 == 19 else 0.3
        gone = [row for row, each in enumerate(rows) if rng.random() < share or len(each) > 60]
        was = cache.leave(gone, len(rows))
        assert sorted(was) == [row for row in range(len(rows)) if row not in gone]
        rows = [rows[row] for row in was]


@torch.inference_mode()
def test_prefixes_are_computed_anew_in_place_of_what_was_there(subject) -> None:
    """As after a weight update: rows are entered from the first one on, over what older weights left."""
    model, passes = subject
    cache = passes(model, 3)
    cache.advance(NOTHING, [torch.tensor([1, 2, 3]), torch.tensor([4])])
    weights = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    got = cache.advance(NOTHING, [torch.tensor([5, 6]), torch.tensor([7, 8, 9, 10])])
    for row, logits in zip(([5, 6], [7, 8, 9, 10]), got, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=1e-4)
    for parameter, before in zip(model.parameters(), weights, strict=True):
        parameter.data = before


def test_the_longest_rows_stand_first_and_few_move() -> None:
    """A hundred rows that come with one token and leave at random: groups keep apart what is long and what is short."""
    rng, cache, number = random.Random(0), columns.Columns(100), 0
    for _ in range(500):
        cache.make_room([torch.empty(0, 1, 0, 1)], number, 100, 1)
        cache.end += 1
        cache.lengths[:number] += 1
        cache.lengths[number:] = 1
        was = cache.leave([row for row in range(100) if rng.random() < 0.02], 100)
        number = len(was)
        assert sum(row != before for row, before in enumerate(was)) <= 7 * (100 - number)
    of_groups = [cache.lengths[first : first + columns.GROUP] for first in range(0, number, columns.GROUP)]
    padded = sum(int(each.max()) * len(each) for each in of_groups)
    assert padded < 1.6 * cache.lengths[:number].sum() < 0.5 * number * int(cache.lengths[:number].max())
