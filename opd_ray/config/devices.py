"""What engines ask of their devices. Actors that together ask Ray for no more than one GPU may be put on the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def may_share_a_device(actors: Iterable[tuple[int, float]]) -> bool:
    """May two of these actors (how many, and GPUs of each) be given the same GPU?"""
    fractions = sorted(gpus for number, gpus in actors for _ in range(min(number, 2)) if 0 < gpus < 1)
    return len(fractions) > 1 and fractions[0] + fractions[1] < 1 + 1e-6


def settle_dtype(section: Any, gpus: float) -> None:
    """Puts into a section what its dtype "auto" stands for: bfloat16 where the room has GPUs, float32 on CPUs."""
    if section.dtype == "auto":
        object.__setattr__(section, "dtype", "bfloat16" if gpus else "float32")


def memory_share(gpu_memory_utilization: float, gpus: float) -> float:
    """Share of a card's memory for an engine, which vLLM counts of the whole card: with a fraction of a GPU, of that
    fraction."""
    return gpu_memory_utilization * min(1.0, gpus or 1.0)


def check_spans_whole_gpus(field: str, gpus: float, tensor_parallel_size: int) -> None:
    """Raises ValueError where the workers of one engine would be given one device."""
    if tensor_parallel_size > 1 and gpus % 1:
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size} spans whole GPUs, but {field}={gpus:g}")


def check_spans_one_device(engine: str, tensor_parallel_size: int) -> None:
    """Raises ValueError where workers would be reserved, and places in a broadcast, for an engine that has only one."""
    if tensor_parallel_size > 1 and engine == "torch":
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size} needs engine=vllm, but it is torch")


def check_takes_engine_args(engine: str, engine_args: Mapping[str, Any]) -> None:
    """Raises ValueError where nobody would read them."""
    if engine_args and engine == "torch":
        raise ValueError(f"engine_args={dict(engine_args)} are vLLM's, but engine is {engine}")
