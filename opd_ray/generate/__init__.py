"""GENERATE: students (and teachers) that write rollouts.

The engine is made inside the actor, so that only an actor imports an inference library.
"""

from __future__ import annotations

import math
from typing import Any

from opd_ray.config import RolloutConfig
from opd_ray.generate.engine import GenerationEngine
from opd_ray.models.checkpoints import read_config
from opd_ray.models.size import size_of


def make_generation_engine(path: str, rollout: RolloutConfig, max_context_tokens: int) -> GenerationEngine:
    """The configured engine on the student's checkpoint."""
    shared: dict[str, Any] = {
        "path": path,
        "dtype": rollout.dtype,
        "max_num_seqs": rollout.max_num_seqs,
        "max_context_tokens": max_context_tokens,
    }
    if chosen_engine(path, rollout) == "torch":
        from opd_ray.generate.torch import TorchGenerationEngine

        return TorchGenerationEngine(**shared, device="cuda" if rollout.gpus_per_generator else "cpu")
    from opd_ray.generate.vllm import VllmGenerationEngine

    return VllmGenerationEngine(
        **shared,
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_bytes=rollout.kv_cache_bytes,
        gpu_memory_utilization=rollout.memory_share,
        engine_args=rollout.engine_args,
    )


def chosen_engine(path: str, rollout: RolloutConfig) -> str:
    """The engine that a checkpoint gets; it is looked at where its size decides."""
    if (smallest := rollout.engine_for(0)) == rollout.engine_for(math.inf):
        return smallest
    return rollout.engine_for(size_of(read_config(path).get_text_config(), path).parameters)
