"""Sizes of models that are known from their cards, without their checkpoints."""

from __future__ import annotations

from opd_ray.models.size import ModelSize, dense_parameters


def _model(*numbers: int, tied: bool) -> ModelSize:
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    shape = dict(zip(names, numbers, strict=True)) | {"tied": tied}
    return ModelSize(parameters=dense_parameters(**shape), **shape)


QWEN25_1B5 = _model(151_936, 1536, 28, 12, 2, 128, 8960, tied=True)
QWEN25_7B = _model(152_064, 3584, 28, 28, 4, 128, 18_944, tied=False)
QWEN3_1B7 = _model(151_936, 2048, 28, 16, 8, 128, 6144, tied=True)
TINY = ModelSize(1000, 10, 8, 2, 2, 1, 4, 16, tied=False)
"""Nobody's: V 10, H 8, L 2, A 2, K 1, d 4, I 16, and 1000 parameters for easy sums."""
SMOLLM2_135M = _model(49_152, 576, 30, 9, 3, 64, 1536, tied=True)
