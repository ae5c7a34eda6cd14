"""Output layers: the student's under its loss, and those of frozen models read from their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig

from objective_step import whole
from opd_ray.config import from_dict
from opd_ray.errors import InputError
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.models.heads import load_head, load_heads
from scored_rollouts import scored_entries

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "soft cap, tied": lambda: Gemma2Config(**SMALL, final_logit_softcapping=3.0),
    "scale": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "divisor": lambda: GraniteConfig(**SMALL, logits_scaling=4.0),
    "other names": lambda: GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5),
}


def make(config: Callable[[], object]) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_body_and_loaded_head_give_the_models_own_logits(tmp_path: Path, name: str) -> None:
    model = make(ARCHITECTURES[name])
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
        hidden = model.base_model(tokens).last_hidden_state
    head = load_head(tmp_path, torch.float32, CPU)
    torch.testing.assert_close(head(hidden[0]).log_softmax(-1)[None], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_students_head_gives_its_loss_the_models_own_logits(name: str) -> None:
    model = make(ARCHITECTURES[name])
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits[0].log_softmax(-1)
    module = ResponseModel(model)
    seen = []
    module.consume(lambda hidden, head: seen.append(head.logits(hidden)) or seen[0].sum())
    module(tokens, None, torch.tensor([6, 2]))
    torch.testing.assert_close(seen[0].log_softmax(-1), expected[[6, 2]], atol=1e-5, rtol=1e-5)
    assert float(seen[0].detach().amax(-1).abs().max()) == 0.0
    torch.testing.assert_close(model(tokens).logits[0].log_softmax(-1), expected)


@pytest.mark.parametrize("packing", [False, True])
def test_each_token_is_predicted_from_its_own_prefix(tiny_model: dict[str, Path], packing: bool) -> None:
    """Right padding needs no mask, packed rows do not see each other, and the gather picks position t − 1."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32")
    module = ResponseModel(AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32"))
    entries = scored_entries([(3, 9), (8, 2), (5, 14)], [(4, 12)])
    batch = collate(entries, fetch_payloads(whole(entries), lambda refs: refs)[0], packing=packing)
    seen = []
    module.consume(lambda hidden, head: seen.append(head.logits(hidden)) or seen[0].sum())
    module(batch.input_ids, batch.position_ids, batch.logit_index)
    start = 0
    for rollout in entries:
        row = rollout.rollouts.slice(rollout.row, 1).to_pylist()[0]
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        expected = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs = seen[0][start : start + len(response)].log_softmax(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
        start += len(response)


def test_a_student_whose_logits_are_not_understood_is_refused() -> None:
    model = make(ARCHITECTURES["soft cap, tied"])
    forward = model.forward

    def strange(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = strange
    with pytest.raises(InputError, match="Gemma2ForCausalLM does something unknown to its logits"):
        ResponseModel(model)


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path: Path, tiny_model: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model["untied"])
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="'lm_head.weight'"):
        load_head(tmp_path, torch.float32, CPU)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(
    tmp_path: Path, tiny_model: dict[str, Path]
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model["untied"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"\[32, 64\], but config.json says \[40, 64\]"):
        load_head(tmp_path, torch.float32, CPU)


def test_a_head_is_only_loaded_where_the_loss_compares_whole_vocabularies(tiny_model: dict[str, Path]) -> None:
    paths = {"teacher": {"path": str(tiny_model["untied"])}, "reference": {"path": "student"}}
    student = str(tiny_model["tied"])
    assert load_heads(from_dict(paths), student, CPU) == {}
    full = {"student": {"support": "full"}, "reference": {"estimator": "full"}}
    heads = load_heads(from_dict(paths | {"loss": full}), student, CPU)
    for role, path in (("teacher", tiny_model["untied"]), ("reference", tiny_model["tied"])):
        weight = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight
        assert torch.equal(heads[role].weight, weight.detach())
