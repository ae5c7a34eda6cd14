"""Which parameters a weight broadcast sends, under which names and in which order.

The learner calls ``weights_of`` once per broadcast and hands the same list to ``manifest_of``
(for the engines) and to ``WeightTransport.send`` (for the bytes), so both agree by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import WeightManifest


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Every parameter under every name it has, in module order.

    A tied ``lm_head.weight`` appears beside the embedding it shares: vLLM keeps a repacked copy
    of it on CPUs, which stays at the old weights, without an error, unless it is sent by name
    (seen as log-probs that were off by 1.3 nats).
    """
    return list(model.named_parameters(remove_duplicate=False))


def manifest_of(weights: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightManifest:
    """Names, dtypes and full shapes of ``weights``; gathers nothing.

    Under ZeRO-3 a parameter is empty while it is not gathered; DeepSpeed keeps its shape in
    ``ds_shape``.
    """
    weights = list(weights)
    return WeightManifest(
        version=version,
        names=tuple(name for name, _ in weights),
        dtypes=tuple(dtype_name(tensor.dtype) for _, tensor in weights),
        shapes=tuple(tuple(getattr(tensor, "ds_shape", tensor.shape)) for _, tensor in weights),
    )


def check_fits(manifest: WeightManifest, parameters: Mapping[str, torch.Tensor], whose: str) -> None:
    """Refuses a broadcast that lacks one of a model's parameters or has it in another shape."""
    shapes = dict(zip(manifest.names, manifest.shapes, strict=True))
    if missing := parameters.keys() - shapes.keys():
        raise WeightSyncError(
            f"weights: the broadcast of version {manifest.version} leaves out {len(missing)} parameters of {whose}, "
            f"as {min(missing)}; it must have the student's architecture"
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tuple(shapes[name]):
            raise WeightSyncError(
                f"weights: {name} has shape {list(shapes[name])} in the student but {list(parameter.shape)} in "
                f"{whose}; it must have the student's architecture"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → "float32"."""
    return str(dtype).removeprefix("torch.")
