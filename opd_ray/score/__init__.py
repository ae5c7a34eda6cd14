"""SCORE: what teachers and reference think of the rollouts.

The engine is made inside the actor, so that only an actor imports an inference library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_ray.config import ScorerConfig
from opd_ray.score.engine import ScoringEngine

if TYPE_CHECKING:
    from opd_ray.score.replicas import Baseline
    from opd_ray.score.server import Key


def make_scoring_engine(scorer: ScorerConfig, max_context_tokens: int) -> ScoringEngine:
    """The configured engine on a scorer's checkpoint, for sequences of at most that many tokens."""
    if scorer.engine == "torch":
        from opd_ray.score.torch import TorchScoringEngine

        return TorchScoringEngine(
            path=scorer.path,
            dtype=scorer.dtype,
            device="cuda" if scorer.gpus_per_actor else "cpu",
            max_batch_tokens=scorer.max_batch_tokens,
        )
    from opd_ray.score.vllm import VllmScoringEngine

    return VllmScoringEngine(
        path=scorer.path,
        dtype=scorer.dtype,
        tensor_parallel_size=scorer.tensor_parallel_size,
        max_num_seqs=scorer.max_num_seqs,
        max_context_tokens=max_context_tokens,
        kv_cache_bytes=scorer.kv_cache_bytes,
        gpu_memory_utilization=scorer.memory_share,
        engine_args=scorer.engine_args,
    )


def make_remote_engine(scorer: ScorerConfig, baseline: Baseline, key: Key | None, deadline_s: float) -> ScoringEngine:
    """The engine on the servers of ``scorer.url``."""
    from opd_ray.score.remote import RemoteScoringEngine
    from opd_ray.score.server import Server

    most = scorer.max_num_seqs
    return RemoteScoringEngine(
        servers=[Server(url, model=name, key=key, most_at_once=most) for url, name in baseline.models.items()],
        baseline=baseline,
        most_at_once=most,
        deadline_s=deadline_s,
    )
