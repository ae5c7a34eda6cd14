"""What vLLM needs in both of its roles, generating and scoring: process settings, arguments, its lists as arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm import LLMEngine


def columns(flat: Any, num_tokens: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and ids, [num_tokens, 1 + top_k] each, from the end of vLLM's flat list: the token itself, then the
    most probable ones."""
    start = len(flat.logprobs) - num_tokens * (top_k + 1)
    logprobs = np.asarray(flat.logprobs[start:], dtype=np.float32).reshape(-1, top_k + 1)
    return logprobs, np.asarray(flat.token_ids[start:], dtype=np.int32).reshape(-1, top_k + 1)


def vocabulary_size(engine: LLMEngine) -> int:
    """Width of the output layer."""
    return engine.vllm_config.model_config.get_vocab_size()


def prompt_input(tokens: Sequence[int]) -> Any:
    """Token ids as vLLM takes a prompt."""
    from vllm.inputs import tokens_input

    return tokens_input([int(token) for token in tokens])


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
