"""Weights that are not those of their config.json are refused before anything loads them. The bug: they passed
preflight and ended the run a minute later, with "see the above report" and a run directory in the way."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file

from opd_ray.__main__ import main
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.models.checkpoints import inspect
from opd_ray.models.weights import INDEX, check_files, check_names, check_weights, headers, on_this_node, weight_files
from opd_ray.run import preflight
from tiny_checkpoints import configured, make_setting, refused

Weights = dict[str, torch.Tensor]
_LAYER = "model.layers.1.mlp.up_proj.weight"


def _without(weights: Weights, *parts: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}


def _with_nan(weights: Weights) -> Weights:
    weights["model.norm.weight"][3] = float("nan")
    return weights


def _quantised(raw: dict) -> None:
    raw["quantization_config"] = {"quant_method": "fp8"}


BROKEN: dict[str, tuple[Callable[[dict], object] | None, Callable[[Weights], Weights], str]] = {
    "a narrower vocabulary": (
        lambda raw: raw.update(vocab_size=raw["vocab_size"] + 8),
        lambda weights: weights,
        "lm_head.weight is [",
    ),
    "another width": (
        lambda raw: raw.update(intermediate_size=128),
        lambda weights: weights,
        "expected [64, 128] (the first of 6)",
    ),
    "more layers in config.json": (
        lambda raw: raw.update(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        lambda weights: weights,
        "model.layers.2.input_layernorm.weight is missing (the first of 11)",
    ),
    "fewer layers in config.json": (
        lambda raw: raw.update(num_hidden_layers=1, layer_types=["full_attention"]),
        lambda weights: weights,
        "model.layers.1.input_layernorm.weight is none of its parameters (the first of 11)",
    ),
    "a parameter is missing": (None, lambda weights: _without(weights, _LAYER), f"{_LAYER} is missing (the only one)"),
    "no output layer": (None, lambda weights: _without(weights, "lm_head"), "lm_head.weight is missing"),
    "another architecture's": (
        None,
        lambda weights: _without(weights, "q_norm", "k_norm"),
        "are not those of the Qwen3ForCausalLM that config.json describes: model.layers.0.self_attn.k_norm.weight",
    ),
    "adapters": (
        None,
        lambda weights: {f"base_model.model.{name}": tensor for name, tensor in weights.items()},
        "is missing",
    ),
    "no architecture": (lambda raw: raw.update(hidden_size="wide"), lambda weights: weights, "cannot make a causal"),
    "whole numbers": (
        None,
        lambda weights: {name: tensor.to(torch.int8) for name, tensor in weights.items()},
        "of format I8, expected one of F64, F32, F16, BF16",
    ),
    "quantised": (_quantised, lambda weights: weights, "its weights are quantised (fp8)"),
    "NaN": (None, _with_nan, "model.norm.weight in model.safetensors has NaN or infinity"),
    "infinity in a matrix": (
        None,
        lambda weights: weights | {_LAYER: torch.full_like(weights[_LAYER], float("inf"))},
        f"{_LAYER}[0] in model.safetensors has NaN or infinity",
    ),
}


@pytest.fixture
def checkpoint(tiny_model: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model["untied"], tmp_path / "model"))


def _spoil(checkpoint: Path, kind: str) -> str:
    """Makes it one of BROKEN; what is said of it then."""
    change_config, change_weights, said = BROKEN[kind]
    weights = change_weights(load_file(checkpoint / "model.safetensors"))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    if change_config:
        raw = json.loads((checkpoint / "config.json").read_text())
        change_config(raw)
        (checkpoint / "config.json").write_text(json.dumps(raw))
    return said


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_are_not_their_configurations_are_refused(checkpoint: Path, kind: str) -> None:
    said = _spoil(checkpoint, kind)
    message = refused(lambda: check_weights("student.path=X", str(checkpoint), quantised=False))
    assert message.startswith("student.path=X: ") and said in message


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_whole_weights_pass(tiny_model: dict[str, Path], name: str) -> None:
    check_weights("X", str(tiny_model[name]), quantised=False)


def test_what_transformers_reads_all_the_same_passes(checkpoint: Path) -> None:
    """A tied output layer that is saved as well, a checkpoint of the body alone, and rotary buffers of long ago."""
    raw = json.loads((checkpoint / "config.json").read_text()) | {"tie_word_embeddings": True}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    check_weights("X", str(checkpoint), quantised=False)
    weights = _without(load_file(checkpoint / "model.safetensors"), "lm_head")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    body = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(body, checkpoint / "model.safetensors", metadata={"format": "pt"})
    check_weights("X", str(checkpoint), quantised=False)


def test_a_quantised_scorer_of_vllms_is_looked_at_for_its_numbers_alone(checkpoint: Path) -> None:
    _spoil(checkpoint, "quantised")
    check_weights("X", str(checkpoint), quantised=True)
    _spoil(checkpoint, "NaN")
    assert "has NaN" in refused(lambda: check_weights("X", str(checkpoint), quantised=True))


# ---- files ----


def _shards(checkpoint: Path, index: dict[str, str] | str) -> None:
    text = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (checkpoint / INDEX).write_text(text)


def test_shards_are_those_of_the_index(checkpoint: Path) -> None:
    """Mistral's repositories hold the same weights once more in another layout."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.safetensors")
    assert "neither model.safetensors nor" in refused(lambda: check_files("X", checkpoint))
    parts = {"a.safetensors": list(weights)[:9], "b.safetensors": list(weights)[9:]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, checkpoint / file, metadata={"format": "pt"})
    _shards(checkpoint, {name: file for file, names in parts.items() for name in names})
    check_files("X", checkpoint)
    check_weights("X", str(checkpoint), quantised=False)
    assert [file.name for file in weight_files(checkpoint)] == list(parts)
    assert {name for name, _, _ in headers(checkpoint)} == weights.keys()
    _shards(checkpoint, dict.fromkeys(weights, "a.safetensors"))
    assert "which is in no file" in refused(lambda: check_files("X", checkpoint))


@pytest.mark.parametrize("index", ["[", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', "[" * 99_999])
def test_a_damaged_index_is_refused(checkpoint: Path, index: str) -> None:
    _shards(checkpoint, index)
    assert f"{INDEX} is damaged" in refused(lambda: check_files("X", checkpoint))


def test_two_sets_of_weights_are_refused(checkpoint: Path) -> None:
    """Transformers would take the one and vLLM the other."""
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "a.safetensors")
    _shards(checkpoint, {"lm_head.weight": "a.safetensors"})
    assert "it is not clear which of them the weights are" in refused(lambda: check_files("X", checkpoint))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "its weights are pickles (pytorch_model.bin), which can run code; if you trust"),
        ("model.gguf", "has model.gguf and no *.safetensors; give a directory that save_pretrained wrote"),
        ("notes.txt", "has no weights"),
    ],
)
def test_other_formats_are_refused_with_the_way_out(checkpoint: Path, file: str, said: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / file)
    assert said in refused(lambda: check_files("X", checkpoint))


def test_the_conversion_that_is_proposed_converts(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    command = refused(lambda: check_files("X", checkpoint)).partition('python -c "')[2].removesuffix('"')
    exec(command, {})
    check_files("X", checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == weights.keys()


def test_a_repository_of_pickles_alone_is_refused() -> None:
    check_names("X", ["config.json", "pytorch_model.bin", "model.safetensors"])
    assert "has no *.safetensors on the Hub" in refused(lambda: check_names("X", ["pytorch_model.bin"]))


def test_of_the_hub_only_what_was_downloaded_whole_is_looked_at(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bug: preflight fetches config.json itself, and then missed the weights beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--org--m"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("c0ffee")
    there = stored / "snapshots/c0ffee"
    there.mkdir(parents=True)
    shutil.copy(checkpoint / "config.json", there)
    assert try_to_load_from_cache("org/m", "config.json", cache_dir=tmp_path) == str(there / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=tmp_path))
    assert on_this_node("org/m") is None
    check_weights("X", "org/m", quantised=False)
    (there / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    shutil.copy(checkpoint / "model.safetensors", there / "one.safetensors")
    assert on_this_node("org/m") is None, "a download that was broken off"
    (there / INDEX).unlink()
    (there / "one.safetensors").rename(there / "model.safetensors")
    assert on_this_node("org/m") == there
    check_weights("X", "org/m", quantised=False)


def test_adapters_beside_whole_weights_are_refused(checkpoint: Path) -> None:
    """The bug: transformers loaded the adapters on them and vLLM did not, so that rooms had different models."""
    check_files("X", checkpoint)
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "adapter_config.json beside weights of its own" in refused(lambda: check_files("X", checkpoint))


# ---- on the way to a run ----


def test_code_that_a_checkpoint_brings_is_not_run_and_nobody_is_asked(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: transformers asked "[y/N]" at the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    raw = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    (checkpoint / "code.py").write_text(f"import pathlib\npathlib.Path({str(checkpoint / 'ran')!r}).touch()")
    (checkpoint / "tokenizer.json").write_text("{}")
    message = refused(lambda: inspect("student.path", str(checkpoint)))
    assert "brings code of its own, which opd_ray does not run" in message and not (checkpoint / "ran").exists()


def test_every_model_that_is_loaded_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "opd_ray.models.weights.check_weights", lambda name, _, quantised: asked.append((name, quantised))
    )
    setting = make_setting(tmp_path)
    changes = {"teacher.engine": "vllm", "reference.path": "r", "reference.engine": "torch"}
    preflight.check_weights(configured(setting | changes))
    assert [(name.partition("=")[0], quantised) for name, quantised in asked] == [
        ("student.path", False),
        ("teacher.path", True),
        ("reference.path", False),
    ]
    asked.clear()
    preflight.check_weights(configured(setting | changes | {"reference.path": setting["teacher.path"]}))
    assert [(name.partition("=")[0], quantised) for name, quantised in asked][1:] == [("teacher.path", False)], (
        "one path in two rooms may be what both may read"
    )
    asked.clear()
    preflight.check_weights(configured(setting), evaluation_only=True)
    preflight.check_weights(configured(setting, student__path=str(TEACHER_DIR)), evaluation_only=True)
    assert [name.partition("=")[0] for name, _ in asked] == ["student.path"]


@pytest.mark.parametrize("verb", ["train", "preflight"])
def test_a_refused_run_leaves_nothing_behind(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = make_setting(tmp_path)
    command = [verb, "--run-dir", str(tmp_path / "run"), *(f"{name}={value}" for name, value in setting.items())]
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as end:
        main(command)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "its weights are not those of the Qwen3ForCausalLM" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
