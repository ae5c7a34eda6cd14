"""From configuration to engine. Runs inside the actors, so that only they import an inference library."""

from __future__ import annotations

from typing import Any

from opd_ray.config import RolloutConfig, ScorerConfig
from opd_ray.engines import GenerationEngine, ScoringEngine


def make_generation_engine(
    path: str, rollout: RolloutConfig, weight_backend: str, max_context_tokens: int
) -> GenerationEngine:
    """The configured engine on the student's checkpoint. Runs inside the actor."""
    shared: dict[str, Any] = {
        "path": path,
        "dtype": rollout.dtype,
        "max_num_seqs": rollout.max_num_seqs,
        "max_context_tokens": max_context_tokens,
        "weight_backend": weight_backend,
    }
    if rollout.engine == "torch":
        from opd_ray.engines.torch import TorchGenerationEngine

        return TorchGenerationEngine(**shared, device="cuda" if rollout.gpus_per_generator else "cpu")
    from opd_ray.engines.vllm import VllmGenerationEngine

    return VllmGenerationEngine(
        **shared,
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_bytes=rollout.kv_cache_bytes,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
    )


def make_scoring_engine(scorer: ScorerConfig, max_context_tokens: int | None) -> ScoringEngine:
    """The configured engine on a scorer's checkpoint, which sets the longest sequence where that is None."""
    if scorer.engine == "torch":
        from opd_ray.engines.torch_scoring import TorchScoringEngine

        return TorchScoringEngine(
            path=scorer.path,
            dtype=scorer.dtype,
            device="cuda" if scorer.gpus_per_actor else "cpu",
            max_batch_tokens=scorer.max_batch_tokens,
        )
    from opd_ray.engines.vllm_scoring import VllmScoringEngine

    return VllmScoringEngine(
        path=scorer.path,
        dtype=scorer.dtype,
        max_context_tokens=max_context_tokens,
        gpu_memory_utilization=scorer.gpu_memory_utilization,
    )


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
