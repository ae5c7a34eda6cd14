"""GenerationEngine on vLLM: an in-process LLMEngine, driven by ``step``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd_ray.errors import WeightSyncError
from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.messages import Finished, GenerationRequest, RepetitionRule, TransferGroup, WeightManifest
from opd_ray.models.vllm import (
    TRANSFER_BACKEND,
    add,
    build,
    context_limit,
    vocabulary_size,
)


class VllmGenerationEngine:
    """GenerationEngine on vLLM.

    Log-probs are those of the sampled distribution (after temperature and top-p); greedy requests report the
    untempered distribution. Of the top_k ids those outside of a top-p nucleus smaller than k are arbitrary.
    """

    def __init__(
        self, *, path: str, max_context_tokens: int | None = None, max_batch_tokens: int = 8192, **engine: Any
    ) -> None:
        """``max_context_tokens`` caps prompt + response, by default at what the checkpoint allows;
        ``max_batch_tokens`` bounds the tokens of one step, prefills and recomputed prefixes included.
        ``engine``: see :func:`opd_ray.models.vllm.build`."""
        self._max_context_tokens = context_limit(path, max_context_tokens)
        self._engine = build(
            path,
            max_model_len=self._max_context_tokens,
            **_prefill_arguments(max_batch_tokens, self._max_context_tokens),
            # On CPUs the bookkeeping of the prefix cache costs a tenth of the tokens per second.
            enable_prefix_caching=torch.cuda.is_available(),
            logprobs_mode="processed_logprobs",
            weight_transfer_config={"backend": TRANSFER_BACKEND},
            **engine,
        )
        self._vocab_size = vocabulary_size(self._engine)
        # The workers of several would also have to step together while they receive, with two communicators on one
        # device, which NCCL does not promise to end.
        self.beside_steps = self._engine.vllm_config.parallel_config.world_size == 1
        self._manifest: WeightManifest | None = None
        self._unfinished: dict[str, GenerationRequest] = {}
        self._num_updates = 0
        self._serve_version(0)

    def submit(self, request: GenerationRequest) -> None:
        budget = response_budget(request, self._max_context_tokens)
        self._unfinished[request.request_id] = request
        add(
            self._engine,
            request.request_id,
            request.prompt_tokens,
            # Nobody shares keys and values that are older than itself. A version may come twice, with other weights.
            cache_salt=str(self._num_updates),
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            max_tokens=budget,
            seed=request.seed,
            stop_token_ids=list(request.sampling.stop_token_ids),
            logprobs=self._top_k(request),
            repetition_detection=_detection(request.sampling.repetition_rule),
        )

    def step(self) -> list[Finished]:
        finished = []
        for output in self._engine.step():
            completion = output.outputs[0]
            request = self._unfinished.pop(output.request_id)
            logprobs, ids = completion.logprobs.last(len(completion.token_ids))
            finished.append(
                Finished(
                    request_id=output.request_id,
                    tokens=np.asarray(completion.token_ids, dtype=np.int32),
                    logprobs=logprobs[:, 0].copy(),
                    weight_versions=_per_token(completion.weight_versions),
                    finish_reason=completion.finish_reason,
                    topk_ids=ids[:, 1:].copy() if request.sampling.top_k else None,
                )
            )
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        unfinished = [request_id for request_id in request_ids if self._unfinished.pop(request_id, None)]
        self._engine.abort_request(unfinished)

    def connect(self, group: TransferGroup) -> None:
        self._on_workers("init_weight_transfer_engine", group, "join the transfer group")

    def receive(self, manifest: WeightManifest) -> None:
        if self.beside_steps:  # otherwise it is received where it is installed
            self._on_workers("opd_receive", manifest, f"receive weight version {manifest.version}")
        self._manifest = manifest

    def install(self, unfinished: Unfinished) -> None:
        manifest = self._manifest
        begun_again = list(self._unfinished.values()) if unfinished == "restart" else []
        self._engine.abort_request([request.request_id for request in begun_again])
        self._on_workers("opd_update_weights", manifest, f"load weight version {manifest.version}")
        if unfinished == "recompute":
            self._engine.reset_prefix_cache(reset_running_requests=True)  # preempts what runs
        self._num_updates += 1
        self._serve_version(manifest.version)
        for request in begun_again:
            self.submit(request)

    def _top_k(self, request: GenerationRequest) -> int:
        return min(request.sampling.top_k, self._vocab_size)

    def _serve_version(self, version: int) -> None:
        self.weight_version = version
        # vLLM labels each step's tokens with it and returns the spans with the finished response.
        self._engine.set_weight_version(str(version))

    def _on_workers(self, method: str, argument: TransferGroup | WeightManifest, action: str) -> None:
        try:
            self._engine.collective_rpc(method, args=(dataclasses.asdict(argument),))
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"weights: a vLLM engine could not {action}: {error}") from error


def _per_token(spans: Any) -> np.ndarray:
    """vLLM's (version, start, end) spans as one version per token."""
    versions = [int(span.version) for span in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), [span.end - span.start for span in spans])


def _detection(rule: RepetitionRule | None) -> Any:
    """The rule as vLLM's sampling parameters have it."""
    if rule is None:
        return None
    from vllm.sampling_params import RepetitionDetectionParams

    return RepetitionDetectionParams(**rule._asdict())


def _prefill_arguments(max_batch_tokens: int, max_context_tokens: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"max_num_batched_tokens": max_batch_tokens}
    # vLLM rewinds a request's random generator when its prefix takes more than one step, which a
    # CPU generator refuses ("does not use offset"): prefixes stay whole there.
    return {"max_num_batched_tokens": max(max_batch_tokens, max_context_tokens), "enable_chunked_prefill": False}
