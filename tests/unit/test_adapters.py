"""Low-rank adapters: which layers get them, what they amount to, and what is written of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from objective_step import whole
from opd_ray.config import LoraConfig, from_dict
from opd_ray.errors import InputError, WeightSyncError
from opd_ray.learn.adapters import Adapters, write_adapter
from opd_ray.learn.export import with_adapters
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.learn.objective import Objective
from opd_ray.learn.reference import OwnReference
from opd_ray.models.adapters import adapted_layers
from opd_ray.models.checkpoints import read_weights
from opd_ray.models.size import size_of
from opd_ray.plan.flow import broadcast_bytes
from opd_ray.plan.memory import snapshot_bytes
from opd_ray.score.engine import Rollout
from opd_ray.score.requests import reference_request
from opd_ray.score.torch import TorchScoringEngine
from opd_ray.weights.adapters import adapter_names, merged
from opd_ray.weights.manifest import check_fits, manifest_of, num_bytes, weights_of
from scored_rollouts import scored_entries

LORA = LoraConfig(rank=4, alpha=8)
COLUMNS = ("prompt_tokens", "response_tokens")
TOKENS = torch.arange(12)[None]


def adapted(path: Path, lora: LoraConfig = LORA, seed: int = 0) -> tuple[PreTrainedModel, Adapters]:
    """The model with adapters that were trained: none of their numbers is 0."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    adapters = Adapters(model, adapted_layers("here", path, lora), lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in adapters.weights():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model, adapters


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.slow
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(tiny_model: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32")
    before = logits(model)
    adapters = Adapters(model, adapted_layers("here", tiny_model["tied"], LORA), LORA)
    assert torch.equal(logits(model), before)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for _, parameter in adapters.weights()}
    assert len(trained) == 2 * 2 * 7  # q, k, v, o, gate, up and down of two layers


def test_without_them_the_model_is_the_base_and_trains_on_afterwards(tiny_model: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model["untied"], dtype="float32")
    model, adapters = adapted(tiny_model["untied"])
    with adapters.off():
        assert torch.equal(logits(model), logits(base))
    assert (logits(model) - logits(base)).abs().max() > 0.1
    model(TOKENS).logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapters.weights())


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_merged_weights_make_the_same_model_in_transformers_and_the_adapter_alone_in_peft(
    tiny_model: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    from peft import PeftModel

    path = tiny_model[variant]
    model, adapters = adapted(path)
    weights = {name: weight.detach() for name, weight in adapters.weights()}
    received = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    whole = with_adapters(weights, LORA, path, torch.float32)
    assert not received.load_state_dict(whole, strict=False).unexpected_keys
    assert (logits(received) - logits(model)).abs().max() < 1e-4

    write_adapter(tmp_path, weights, str(path), LORA)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(path) and settings["r"] == 4
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype="float32"), tmp_path)
    assert torch.equal(logits(alone), logits(model))


def test_errors_of_many_updates_do_not_add_up(tiny_model: dict[str, Path]) -> None:
    """The adversary: adding each step's difference to rounded weights drifts in bfloat16."""
    path = tiny_model["untied"]
    for seed in range(3):
        _, adapters = adapted(path, seed=seed)
        last = {name: weight.detach() for name, weight in adapters.weights()}
        weights = with_adapters(last, LORA, path, torch.bfloat16)
    base = dict(read_weights(str(path)))
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer + ".lora_A.weight" in last:
            product = last[layer + ".lora_B.weight"].double() @ last[layer + ".lora_A.weight"].double()
            expected = (base[name].double() + 2.0 * product).to(torch.bfloat16)
            assert (weight != expected).float().mean() < 1e-3  # float32 and float64 round alike but for ties
        else:
            assert torch.equal(weight, base[name].to(torch.bfloat16))


def test_a_broadcast_of_adapters_is_small_and_must_fit(tiny_model: dict[str, Path]) -> None:
    model, adapters = adapted(tiny_model["tied"], LoraConfig(rank=1))
    manifest = manifest_of(adapters.weights(), 3)
    assert list(manifest.names) == adapter_names(adapted_layers("here", tiny_model["tied"], LORA))
    assert num_bytes(manifest) == 4 * sum(weight.numel() for _, weight in adapters.weights())
    plain = AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32")
    assert 20 * num_bytes(manifest) < num_bytes(manifest_of(weights_of(plain), 3))

    manifest = dataclasses.replace(manifest, base=str(tiny_model["tied"]))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    check_fits(manifest, parameters, "a generator")
    key = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(WeightSyncError, match=rf"version 3 does not fit a generator: {key} is \[96, 64\] instead"):
        check_fits(manifest, parameters | {key: torch.zeros(3, 4)}, "a generator")
    del parameters[key]
    with pytest.raises(WeightSyncError, match=f"{key} is unknown"):
        check_fits(manifest, parameters, "a generator")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_the_plan_counts_the_parameters_that_there_are(tiny_model: dict[str, Path], targets: str | list[str]) -> None:
    path, lora = tiny_model["tied"], LoraConfig(rank=4, targets=targets)
    model, adapters = adapted(path, lora)
    size = size_of(model.config, path).with_adapters(lora)
    assert size.adapters == size.trained == sum(weight.numel() for _, weight in adapters.weights())
    config = from_dict({"student": {"lora": {"rank": 4, "targets": targets}}})
    assert broadcast_bytes(config, size) == num_bytes(manifest_of(adapters.weights(), 0))
    assert snapshot_bytes(size) == 12 * size.adapters


def test_an_adapter_of_a_layer_that_the_base_lacks_is_no_update() -> None:
    adapters = {"model.layers.7.x.lora_A.weight": torch.ones(1, 2), "model.layers.7.x.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(WeightSyncError, match=r"1 adapters are of layers that the base's files lack, as model\.layers"):
        list(merged([("model.layers.6.x.weight", torch.zeros(2, 2))], adapters, 1.0))


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (["1.mlp.up_proj"], 1), (["self_attn.o_proj"], 2)],
)
def test_targets_are_the_ends_of_names(tiny_model: dict[str, Path], targets: str | list[str], count: int) -> None:
    layers = adapted_layers("here", tiny_model["untied"], LoraConfig(targets=targets))
    assert len(layers) == count and not any("embed" in layer or "lm_head" in layer for layer in layers)


@pytest.mark.parametrize(
    ("target", "said"),
    [("qproj", "did you mean 'q_proj'"), ("lm_head", "known: down_proj"), ("proj", "ends with 'proj'")],
)
def test_a_target_that_is_no_layer_is_refused(tiny_model: dict[str, Path], target: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        adapted_layers("student.path=here", tiny_model["untied"], LoraConfig(targets=["k_proj", target]))
    assert "\n" not in str(caught.value) and "student.path=here" in str(caught.value)


def test_a_layer_that_is_not_linear_is_refused(tiny_model: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model["tied"])
    with pytest.raises(InputError, match=r"model\.norm of Qwen3ForCausalLM is a Qwen3RMSNorm, expected a Linear"):
        Adapters(model, ["model.norm"], LORA)
    with pytest.raises(InputError, match=r"model\.layers\.9\.x of .* is a weight of no layer"):
        Adapters(model, ["model.layers.9.x"], LORA)


@pytest.mark.parametrize("estimator", ["top_k", "full", "k3"])
def test_the_base_scores_as_a_reference_scorer_does(tiny_model: dict[str, Path], estimator: str) -> None:
    """Whatever the adapters have become, in chunks smaller than a rollout, with an EOS set of two."""
    path, stops = tiny_model["untied"], (1, 2)
    loss = {"reference": {"coef": 0.1, "estimator": estimator, "top_k": 5}}
    config = from_dict({"student": {"lora": {"rank": 4}}, "loss": loss})
    model, adapters = adapted(path)
    module = ResponseModel(model)
    objective = Objective(config, vocab_size=module.vocab_size, stop_token_ids=stops)
    objective.chunk_rows = 3
    entries = scored_entries([(3, 9), (8, 2)], [(4, 5)])
    batch = collate(entries, fetch_payloads(whole(entries), lambda refs: refs)[0], packing=False)
    student, golden = OwnReference(module, adapters, objective).beside(batch).segments
    assert golden.tokens.reference is None  # the KL is not over its tokens

    ordered = sorted(entries[:2], key=lambda entry: entry.meta.rollout_id)
    rows = [(entry.rollouts, entry.row) for entry in ordered]
    prompts, responses = ([batch[name][row].values.to_numpy() for batch, row in rows] for name in COLUMNS)
    rollouts = [Rollout(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    scores = TorchScoringEngine(path=str(path), device="cpu").score(rollouts, reference_request(config, stops))
    for name in ("logprobs", "topk_ids", "topk_logprobs", "stop_logprobs", "hidden"):
        expected = np.concatenate([getattr(each, name) for each in scores])
        found = getattr(student.tokens.reference, name)
        if expected.size == 0:
            assert found is None
        else:
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_frozen_output_layer_takes_no_gradient_in_pieces_either(tiny_model: dict[str, Path]) -> None:
    model, adapters = adapted(tiny_model["untied"])
    module, gradients = ResponseModel(model), []
    for sizes in ([6], [2, 3, 1]):
        module.consume(lambda hidden, head, sizes=sizes: head.sum_losses(hidden, sizes, lambda _, logits: logits.sum()))
        module.zero_grad()
        module(TOKENS, None, torch.arange(6)).backward()
        assert model.get_output_embeddings().weight.grad is None
        gradients.append([weight.grad.clone() for _, weight in adapters.weights()])
    torch.testing.assert_close(*gradients)
