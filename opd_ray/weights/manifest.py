"""Which parameters a weight broadcast sends, under which names and in which order.

The manifest (for the engines) and the bytes (``WeightTransfer.send``) are made from the same ``weights_of``, so both
agree by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import WeightManifest
from opd_ray.weights.adapters import adapted_shapes


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Every parameter under every name it has, in module order.

    A tied ``lm_head.weight`` appears beside the embedding it shares: vLLM keeps a repacked copy
    of it on CPUs, which stays at the old weights, without an error, unless it comes by name
    (seen as log-probs that were off by 1.3 nats).
    """
    return list(model.named_parameters(remove_duplicate=False))


def num_bytes(manifest: WeightManifest) -> int:
    """Of the parameters that a broadcast sends to each receiver."""
    sizes = zip(manifest.dtypes, manifest.shapes, strict=True)
    return sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in sizes)


def manifest_of(weights: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightManifest:
    """Names, dtypes and full shapes of ``weights``; gathers nothing. One tensor under two names is tied."""
    sent: dict[int, tuple[str, torch.Tensor]] = {}
    tied = []
    for name, tensor in weights:
        first, _ = sent.setdefault(id(tensor), (name, tensor))
        if first != name:
            tied.append((name, first))
    return WeightManifest(
        version=version,
        names=tuple(name for name, _ in sent.values()),
        dtypes=tuple(dtype_name(tensor.dtype) for _, tensor in sent.values()),
        shapes=tuple(tuple(shape_of(tensor)) for _, tensor in sent.values()),
        tied=tuple(tied),
    )


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The whole parameter's. Under ZeRO-3 one is empty while it is not gathered; DeepSpeed keeps its shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_fits(manifest: WeightManifest, parameters: Mapping[str, torch.Tensor], whose: str) -> None:
    """Refuses a broadcast that lacks one of a model's parameters or has it in another shape; of adapters, one for
    layers that the model has not."""
    sent = dict(zip(manifest.names, manifest.shapes, strict=True))
    sent |= {other: sent[name] for other, name in manifest.tied}
    own = {name: parameter.shape for name, parameter in parameters.items()}
    if manifest.base is None:
        sent = {name: shape for name, shape in sent.items() if name in own}
    else:
        sent = adapted_shapes(sent)
        own = {name: shape for name, shape in own.items() if name in sent}
    if wrong := differing(own, sent):
        raise WeightSyncError(
            f"weights: the broadcast of version {manifest.version} does not fit {whose}: {wrong}; it must have the "
            "student's architecture"
        )


def differing(own: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> str:
    """What is wrong with the ``other`` shapes of a model's parameters, for an error; empty where nothing is."""
    wrong = [f"{name} is missing" for name in own.keys() - other.keys()]
    wrong += [f"{name} is unknown" for name in other.keys() - own.keys()]
    wrong += [
        f"{name} is {list(other[name])} instead of {list(own[name])}"
        for name in own.keys() & other.keys()
        if tuple(other[name]) != tuple(own[name])
    ]
    return ", ".join(sorted(wrong)[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → "float32"."""
    return str(dtype).removeprefix("torch.")
