"""Loading checkpoints: incomplete weights are refused instead of filled with noise."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from opd_ray.errors import InputError
from opd_ray.models.checkpoints import load_causal_lm


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_whole_checkpoints_load(tiny_model, name):
    assert load_causal_lm(tiny_model[name]).config.hidden_size == 64


def test_weights_that_lack_a_parameter_are_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model["untied"], tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of the model's parameters \(model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(tmp_path / "broken")
