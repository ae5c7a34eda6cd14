"""vLLM behind the two engine Protocols: one in-process LLMEngine, driven by ``step``.

Importing vLLM binds the process's memory and turns ``torch.set_num_threads`` into a no-op on
CPUs, so each engine belongs in a process of its own; the import happens in the constructors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opd_ray.engines import Rollout, Scores, Unfinished, response_budget
from opd_ray.errors import WeightSyncError
from opd_ray.messages import Finished, GenerationRequest, TransferGroup, WeightManifest

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams


class VllmGenerationEngine:
    """GenerationEngine on vLLM.

    Log-probs are those of the sampled distribution (after temperature and top-p); greedy
    requests report the untempered distribution.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 64,
        max_context_tokens: int | None = None,
        kv_cache_bytes: int = 256 * 2**20,
        gpu_memory_utilization: float = 0.85,
        max_batch_tokens: int = 8192,
        weight_backend: str = "gloo",
    ) -> None:
        """``max_context_tokens`` caps prompt + response, by default at what the checkpoint allows;
        ``kv_cache_bytes`` counts on CPUs, ``gpu_memory_utilization`` on GPUs; ``max_batch_tokens``
        bounds the tokens of one step, prefills and recomputed prefixes included."""
        _prepare_process()
        from vllm.config import WeightTransferConfig

        self._backend = weight_backend
        self._max_context_tokens = _context_limit(path, max_context_tokens)
        self._engine = _build(
            model=path,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            max_model_len=self._max_context_tokens,
            **_prefill_arguments(max_batch_tokens, self._max_context_tokens),
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=_kv_cache_bytes(kv_cache_bytes),
            # On CPUs the bookkeeping of the prefix cache costs a tenth of the tokens per second.
            enable_prefix_caching=torch.cuda.is_available(),
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=weight_backend),
            worker_extension_cls="opd_ray.weights.vllm_worker.WorkerExtension",
        )
        self._unfinished: dict[str, GenerationRequest] = {}
        self._serve_version(0)

    def submit(self, request: GenerationRequest) -> None:
        budget = response_budget(request, self._max_context_tokens)
        self._unfinished[request.request_id] = request
        self._engine.add_request(request.request_id, _prompt(request.prompt_tokens), _sampling_params(request, budget))

    def step(self) -> list[Finished]:
        finished = []
        for output in self._engine.step():
            completion = output.outputs[0]
            del self._unfinished[output.request_id]
            finished.append(
                Finished(
                    request_id=output.request_id,
                    tokens=np.asarray(completion.token_ids, dtype=np.int32),
                    logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
                    weight_versions=_per_token(completion.weight_versions),
                    finish_reason=completion.finish_reason,
                )
            )
        return finished

    def connect(self, group: TransferGroup) -> None:
        self._on_workers("opd_connect", init_info(self._backend, group), "join the transfer group")

    def update_weights(self, manifest: WeightManifest, unfinished: Unfinished) -> None:
        begun_again = list(self._unfinished.values()) if unfinished == "restart" else []
        self._engine.abort_request([request.request_id for request in begun_again])
        info = update_info(self._backend, manifest)
        self._on_workers("opd_update_weights", info, f"load weight version {manifest.version}")
        # Preempts what runs and empties the prefix cache, so every prefix is recomputed: KV
        # entries of the old weights under the new ones shift the log-probs without an error.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._serve_version(manifest.version)
        for request in begun_again:
            self.submit(request)

    def _serve_version(self, version: int) -> None:
        self.weight_version = version
        # vLLM labels each step's tokens with it and returns the spans with the finished response.
        self._engine.set_weight_version(str(version))

    def _on_workers(self, method: str, info: dict[str, Any], action: str) -> None:
        try:
            self._engine.collective_rpc(method, args=(info,))
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(
                f"weights: a vLLM engine on backend {self._backend} could not {action}: {error}; "
                "do not step this engine again, its weights may be half loaded"
            ) from error


class VllmScoringEngine:
    """ScoringEngine on vLLM's prompt log-probs."""

    def __init__(
        self,
        *,
        path: str,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 64,
        max_context_tokens: int | None = None,
        kv_cache_bytes: int = 256 * 2**20,
        gpu_memory_utilization: float = 0.85,
    ) -> None:
        """As for VllmGenerationEngine."""
        _prepare_process()
        self._engine = _build(
            model=path,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            # vLLM insists on sampling one token, which is never fed back; a sequence of exactly
            # the checkpoint's length needs this room for it.
            max_model_len=_context_limit(path, max_context_tokens) + 1,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=_kv_cache_bytes(kv_cache_bytes),
            enable_prefix_caching=False,
            max_logprobs=-1,
        )
        self._vocab_size = self._engine.vllm_config.model_config.get_vocab_size()
        self._num_calls = 0

    def score(self, sequences: Sequence[Rollout], top_k: int) -> list[Scores]:
        top_k = min(top_k, self._vocab_size)
        self._num_calls += 1
        positions = {}
        for index, sequence in enumerate(sequences):
            tokens = [*sequence.prompt_tokens, *sequence.response_tokens]
            request_id = f"{self._num_calls}-{index}"
            positions[request_id] = index
            self._engine.add_request(request_id, _prompt(tokens), _scoring_params(top_k))
        scores: list[Any] = [None] * len(sequences)
        while positions:
            for output in self._engine.step():
                index = positions.pop(output.request_id)
                scores[index] = _response_scores(output.prompt_logprobs, len(sequences[index].response_tokens), top_k)
        return scores


def init_info(backend: str, group: TransferGroup) -> dict[str, Any]:
    """How a worker joins ``group``, as vLLM's backend "nccl" or our "gloo" wants it."""
    shared = {"rank_offset": group.rank, "world_size": group.world_size}
    if backend == "nccl":
        where = {"master_address": group.host, "master_port": group.port}
        return shared | where | {"packed": True, "packed_buffer_size_bytes": group.bucket_bytes}
    where = {"host": group.host, "port": group.port}
    return shared | where | {"timeout_s": group.timeout_s, "bucket_bytes": group.bucket_bytes}


def update_info(backend: str, manifest: WeightManifest) -> dict[str, Any]:
    """What one broadcast brings, as vLLM's backend "nccl" or our "gloo" wants it."""
    info: dict[str, Any] = {
        "names": list(manifest.names),
        "dtype_names": list(manifest.dtypes),
        "shapes": [list(shape) for shape in manifest.shapes],
    }
    return info if backend == "nccl" else info | {"version": manifest.version}


def _response_scores(prompt_logprobs: Any, num_response_tokens: int, top_k: int) -> Scores:
    """Cuts the response out of vLLM's flat list: for every position but the first, its own token
    and then the ``top_k`` most probable ones."""
    size = num_response_tokens * (top_k + 1)
    start = len(prompt_logprobs.logprobs) - size
    logprobs = np.asarray(prompt_logprobs.logprobs[start:], dtype=np.float32).reshape(-1, top_k + 1)
    ids = np.asarray(prompt_logprobs.token_ids[start:], dtype=np.int32).reshape(-1, top_k + 1)
    return Scores(logprobs=logprobs[:, 0].copy(), topk_ids=ids[:, 1:].copy(), topk_logprobs=logprobs[:, 1:].copy())


def _per_token(spans: Any) -> np.ndarray:
    """vLLM's (version, start, end) spans as one version per token."""
    versions = [int(span.version) for span in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), [span.end - span.start for span in spans])


def _prompt(tokens: Sequence[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input([int(token) for token in tokens])


def _sampling_params(request: GenerationRequest, max_tokens: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        seed=request.seed,
        # The checkpoint's own EOS is ignored: the request names every token that ends it.
        ignore_eos=True,
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scoring_params(top_k: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _prepare_process() -> None:
    """Environment that vLLM reads when it is imported; what the user has set stays."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Each update warns that rotary embeddings, which have no weights, "failed to load weights".
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not torch.cuda.is_available():
        settings |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _context_limit(path: str, max_context_tokens: int | None) -> int:
    from transformers import AutoConfig

    return max_context_tokens or AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings


def _prefill_arguments(max_batch_tokens: int, max_context_tokens: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"max_num_batched_tokens": max_batch_tokens}
    # vLLM rewinds a request's random generator when its prefix takes more than one step, which a
    # CPU generator refuses ("does not use offset"): prefixes stay whole there.
    return {"max_num_batched_tokens": max(max_batch_tokens, max_context_tokens), "enable_chunked_prefill": False}


def _kv_cache_bytes(kv_cache_bytes: int) -> int | None:
    return None if torch.cuda.is_available() else kv_cache_bytes


def _build(*, tensor_parallel_size: int, **arguments: Any) -> LLMEngine:
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            skip_tokenizer_init=True,
            tensor_parallel_size=tensor_parallel_size,
            # Named outright: inside a Ray actor vLLM would pick its Ray executor and ask for more actors.
            distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
            enforce_eager=not torch.cuda.is_available(),
            # An asynchronous step would still be under way on the old weights during an update.
            async_scheduling=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **arguments,
        )
    )
