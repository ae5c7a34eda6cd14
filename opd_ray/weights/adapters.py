"""Low-rank adapters under way: their names, and the weights that they amount to.

A layer whose weight W was frozen works with W + scale · B A: A is [rank, in], B is [out, rank], and these two are all
that is trained and sent. A receiver takes W from the checkpoint of the base anew at every broadcast, and adds in
float32. So it holds the same weights whatever it held before, rounded once and not once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from opd_ray.errors import WeightSyncError

A, B = ".lora_A.weight", ".lora_B.weight"
"""What follows a layer's name in those of its two matrices, as peft's files have it."""


def adapter_names(layers: Iterable[str]) -> list[str]:
    """Of both matrices of every layer."""
    return [layer + part for layer in layers for part in (A, B)]


def adapted_shapes(sent: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """The weights that have an adapter, and their shapes, from the shapes of As and Bs by name."""
    layers = [name.removesuffix(A) for name in sent if name.endswith(A)]
    return {f"{layer}.weight": (sent[layer + B][0], sent[layer + A][1]) for layer in layers}


def merged(
    base: Iterable[tuple[str, torch.Tensor]], adapters: Mapping[str, torch.Tensor], scale: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the base, one after another; those with an adapter, in float32, with what it adds.

    Raises WeightSyncError behind the last where the base has no weight for an adapter.
    """
    waiting = {name.removesuffix(A) for name in adapters if name.endswith(A)}
    for name, weight in base:
        if (layer := name.removesuffix(".weight")) in waiting:
            waiting.remove(layer)
            a, b = (adapters[layer + each].to(weight.device, torch.float32) for each in (A, B))
            weight = torch.addmm(weight.float(), b, a, alpha=scale)
        yield name, weight
    if waiting:
        raise WeightSyncError(
            f"weights: {len(waiting)} adapters are of layers that the base's files lack, as {min(waiting)}; every node "
            "must have the same checkpoint at student.path"
        )
