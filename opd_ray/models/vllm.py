"""What vLLM needs in both of its roles, generating and scoring: process settings, arguments, log-probs as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opd_ray.models.checkpoints import read_config
from opd_ray.models.hub import local_directory
from opd_ray.models.size import cache_bytes
from opd_ray.rooms.node import use_own_interface

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.config import VllmConfig


TRANSFER_BACKEND = "opd_ray"
"""The weight transfer of vLLM's workers that opd_ray.weights.vllm_worker registers."""


class Columns:
    """Log-probs and ids of one position after the other: the token itself, then the most probable ones."""

    _FIRST_ROWS = 64

    def __init__(self, top_k: int) -> None:
        self._logprobs = np.empty((self._FIRST_ROWS, 1 + top_k), np.float32)
        self._ids = np.empty((self._FIRST_ROWS, 1 + top_k), np.int32)
        self._rows = 0

    def append(self, logprobs: Any, ids: Any) -> None:
        """[n, 1 + k] of the next n positions, k at least ``top_k``; an array or a tensor of the host."""
        end, width = self._rows + len(logprobs), self._ids.shape[1]
        if end > len(self._ids):
            more = max(end - self._rows, len(self._ids))
            self._logprobs, self._ids = (
                np.concatenate([each[: self._rows], np.empty((more, width), each.dtype)])
                for each in (self._logprobs, self._ids)
            )
        self._logprobs[self._rows : end] = logprobs[:, :width]
        self._ids[self._rows : end] = ids[:, :width]
        self._rows = end

    def last(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs (nats) and ids of the last positions, [num_tokens, 1 + top_k] each. RuntimeError for fewer."""
        if num_tokens > self._rows:
            raise RuntimeError(f"vLLM gave log-probs of {self._rows} tokens, expected those of {num_tokens}")
        return tuple(each[self._rows - num_tokens : self._rows] for each in (self._logprobs, self._ids))


class LogprobsAsArrays:
    """Stands in the place of vLLM's LogprobsProcessor of one request, and of the FlatLogprobs that it fills.

    These make four Python lists of the arrays that the engine gives: with 64 alternatives, 2 million tokens took 11 GB
    and 37 s, in which no step was made.
    """

    cumulative_logprob = None
    prompt_token_id_logprobs: np.ndarray | None = None

    def __init__(self, logprobs: int | None, prompt_logprobs: int | None) -> None:
        """Both as in SamplingParams."""
        self.logprobs = None if logprobs is None else Columns(logprobs)
        self.prompt_logprobs = None if prompt_logprobs is None else Columns(prompt_logprobs)

    def update_from_output(self, output: Any) -> None:
        """Takes in vLLM's EngineCoreOutput of one step."""
        if (sampled := output.new_logprobs) is not None:
            self.logprobs.append(sampled.logprobs, sampled.logprob_token_ids)
        if (prompt := output.new_prompt_logprobs_tensors) is not None:
            self.prompt_logprobs.append(prompt.logprobs, prompt.logprob_token_ids)
        if output.prompt_token_id_logprobs is not None:
            self.prompt_token_id_logprobs = output.prompt_token_id_logprobs.numpy()


def vocabulary_size(engine: LLMEngine) -> int:
    """Width of the output layer."""
    return engine.vllm_config.model_config.get_vocab_size()


def add(
    engine: LLMEngine, request_id: str, prompt: Sequence[int], cache_salt: str | None = None, **sampling: Any
) -> None:
    """Gives the engine a request, which answers once, when it is finished; ``sampling``: vLLM's SamplingParams. Only
    requests of one ``cache_salt`` share a prefix cache. The answer's log-probs are Columns."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    shared = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    # The checkpoint's own EOS is ignored: the request names every token that ends it.
    parameters = SamplingParams(ignore_eos=True, **shared, **sampling)
    tokens = tokens_input(np.asarray(prompt).tolist(), cache_salt=cache_salt)
    state = engine.output_processor.request_states[engine.add_request(request_id, tokens, parameters)]
    state.logprobs_processor = LogprobsAsArrays(sampling.get("logprobs"), sampling.get("prompt_logprobs"))


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
        # torch has read the line above by now; without this one vLLM's sampler called g++ for half a minute.
        settings["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    use_own_interface()
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def context_limit(path: str, max_context_tokens: int | None) -> int:
    """``max_context_tokens``, or what the checkpoint allows where that is less."""
    allowed = getattr(read_config(path).get_text_config(), "max_position_embeddings", None)
    return min(filter(None, (max_context_tokens, allowed)))


def _cache_bytes(config: VllmConfig) -> int:
    """The key-value cache of an engine as it is configured; more would never be used."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    token_bytes = 2 * heads * model.get_head_size() * model.dtype.itemsize
    most = config.scheduler_config.max_num_seqs
    return cache_bytes(token_bytes, model.max_model_len, most, config.cache_config.block_size)


def build(
    path: str,
    *,
    dtype: str = "float32",
    tensor_parallel_size: int = 1,
    max_num_seqs: int = 64,
    kv_cache_bytes: int | None = None,
    gpu_memory_utilization: float = 0.85,
    engine_args: Mapping[str, Any] = MappingProxyType({}),
    **arguments: Any,
) -> LLMEngine:
    """An engine that speaks tokens and steps only when it is told to; ``arguments`` are vLLM's further ones, and
    ``engine_args`` those of the user, which come before them.

    ``kv_cache_bytes`` counts on CPUs, by default for what the engine may run at once; ``gpu_memory_utilization`` counts
    on GPUs. Importing vLLM binds the process's memory and turns ``torch.set_num_threads`` into a no-op on CPUs, so each
    engine belongs in a process of its own.
    """
    _prepare_process()
    from vllm import EngineArgs, LLMEngine

    cuda = torch.cuda.is_available()
    arguments |= {"enforce_eager": not cuda, "use_tqdm_on_load": False}
    config = EngineArgs(
        model=str(local_directory(path)),
        skip_tokenizer_init=True,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        # Named outright: inside a Ray actor vLLM would pick its Ray executor and ask for more actors.
        distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
        # An asynchronous step would still be under way on the old weights during an update.
        async_scheduling=False,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        max_logprobs=-1,
        worker_extension_cls="opd_ray.weights.vllm_worker.WorkerExtension",
        **(arguments | engine_args),
    ).create_engine_config()
    if not cuda:
        # vLLM's own default is nearly all of the machine's memory.
        config.cache_config.kv_cache_memory_bytes = kv_cache_bytes or _cache_bytes(config)
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)
