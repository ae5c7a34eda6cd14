"""GenerationEngine on vLLM, and what both vLLM engines share: an in-process LLMEngine, driven by ``step``.

Importing vLLM binds the process's memory and turns ``torch.set_num_threads`` into a no-op on
CPUs, so each engine belongs in a process of its own; the import happens in the constructors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opd_ray.engines import Unfinished, response_budget
from opd_ray.errors import WeightSyncError
from opd_ray.messages import Finished, GenerationRequest, TransferGroup, WeightManifest

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams

_WORKER_BACKENDS = {"gloo": "gloo", "nccl": "limited_nccl"}
"""weights.backend to the transfer backend of vLLM's workers (see opd_ray.weights.vllm_worker)."""


class VllmGenerationEngine:
    """GenerationEngine on vLLM.

    Log-probs are those of the sampled distribution (after temperature and top-p); greedy requests report the
    untempered distribution. Of the top_k ids those outside of a top-p nucleus smaller than k are arbitrary.
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
        prepare_process()
        from vllm.config import WeightTransferConfig

        self._backend = weight_backend
        self._max_context_tokens = context_limit(path, max_context_tokens)
        self._engine = build(
            model=path,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            max_model_len=self._max_context_tokens,
            **_prefill_arguments(max_batch_tokens, self._max_context_tokens),
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=cache_bytes(kv_cache_bytes),
            # On CPUs the bookkeeping of the prefix cache costs a tenth of the tokens per second.
            enable_prefix_caching=torch.cuda.is_available(),
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            weight_transfer_config=WeightTransferConfig(backend=_WORKER_BACKENDS[weight_backend]),
            worker_extension_cls="opd_ray.weights.vllm_worker.WorkerExtension",
        )
        self._vocab_size = vocabulary_size(self._engine)
        self._unfinished: dict[str, GenerationRequest] = {}
        self._serve_version(0)

    def submit(self, request: GenerationRequest) -> None:
        budget = response_budget(request, self._max_context_tokens)
        self._unfinished[request.request_id] = request
        parameters = _sampling_params(request, budget, self._top_k(request))
        self._engine.add_request(request.request_id, prompt_input(request.prompt_tokens), parameters)

    def step(self) -> list[Finished]:
        finished = []
        for output in self._engine.step():
            completion = output.outputs[0]
            top_k = self._top_k(self._unfinished.pop(output.request_id))
            logprobs, ids = columns(completion.logprobs, len(completion.token_ids), top_k)
            finished.append(
                Finished(
                    request_id=output.request_id,
                    tokens=np.asarray(completion.token_ids, dtype=np.int32),
                    logprobs=logprobs[:, 0].copy(),
                    weight_versions=_per_token(completion.weight_versions),
                    finish_reason=completion.finish_reason,
                    topk_ids=ids[:, 1:].copy() if top_k else None,
                )
            )
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        unfinished = [request_id for request_id in request_ids if self._unfinished.pop(request_id, None)]
        self._engine.abort_request(unfinished)

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

    def _top_k(self, request: GenerationRequest) -> int:
        return min(request.sampling.top_k, self._vocab_size)

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
                "its weights may be of two versions: do not step it before an update has succeeded"
            ) from error


def init_info(backend: str, group: TransferGroup) -> dict[str, Any]:
    """How a worker joins ``group``, as our backends "limited_nccl" and "gloo" want it."""
    shared = {"rank_offset": group.rank, "world_size": group.world_size, "timeout_s": group.timeout_s}
    if backend == "nccl":
        where = {"master_address": group.host, "master_port": group.port}
        return shared | where | {"packed": True, "packed_buffer_size_bytes": group.bucket_bytes}
    return shared | {"host": group.host, "port": group.port, "bucket_bytes": group.bucket_bytes}


def update_info(backend: str, manifest: WeightManifest) -> dict[str, Any]:
    """What one broadcast brings, as vLLM's backend "nccl" or our "gloo" wants it."""
    info: dict[str, Any] = {
        "names": list(manifest.names),
        "dtype_names": list(manifest.dtypes),
        "shapes": [list(shape) for shape in manifest.shapes],
    }
    return info if backend == "nccl" else info | {"version": manifest.version}


def columns(flat: Any, num_tokens: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and ids, [num_tokens, 1 + top_k] each, from the end of vLLM's flat list: the token itself, then the
    most probable ones."""
    start = len(flat.logprobs) - num_tokens * (top_k + 1)
    logprobs = np.asarray(flat.logprobs[start:], dtype=np.float32).reshape(-1, top_k + 1)
    return logprobs, np.asarray(flat.token_ids[start:], dtype=np.int32).reshape(-1, top_k + 1)


def _per_token(spans: Any) -> np.ndarray:
    """vLLM's (version, start, end) spans as one version per token."""
    versions = [int(span.version) for span in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), [span.end - span.start for span in spans])


def vocabulary_size(engine: LLMEngine) -> int:
    """Width of the output layer."""
    return engine.vllm_config.model_config.get_vocab_size()


def prompt_input(tokens: Sequence[int]) -> Any:
    """Token ids as vLLM takes a prompt."""
    from vllm.inputs import tokens_input

    return tokens_input([int(token) for token in tokens])


def _sampling_params(request: GenerationRequest, max_tokens: int, top_k: int) -> SamplingParams:
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
        logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def prepare_process() -> None:
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


def context_limit(path: str, max_context_tokens: int | None) -> int:
    """``max_context_tokens``, or what the checkpoint allows."""
    from transformers import AutoConfig

    return max_context_tokens or AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings


def _prefill_arguments(max_batch_tokens: int, max_context_tokens: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"max_num_batched_tokens": max_batch_tokens}
    # vLLM rewinds a request's random generator when its prefix takes more than one step, which a
    # CPU generator refuses ("does not use offset"): prefixes stay whole there.
    return {"max_num_batched_tokens": max(max_batch_tokens, max_context_tokens), "enable_chunked_prefill": False}


def cache_bytes(kv_cache_bytes: int) -> int | None:
    """The size of the key-value cache where it is given outright: on CPUs."""
    return None if torch.cuda.is_available() else kv_cache_bytes


def build(*, tensor_parallel_size: int, **arguments: Any) -> LLMEngine:
    """An engine that speaks tokens and steps only when it is told to."""
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
