"""vLLM's arguments that a configuration passes on as they are; known by name without importing vLLM, or torch."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from opd_ray.errors import InputError, near

_OURS = {
    "model": "path",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel_size",
    "max_num_seqs": "max_num_seqs",
    "max_model_len": "student.max_context_tokens",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "kv_cache_memory_bytes": "kv_cache_bytes",
}
"""Arguments that have a field."""
_FIXED = (
    "async_scheduling",
    "data_parallel_size",
    "distributed_executor_backend",
    "logprobs_mode",
    "max_logprobs",
    "pipeline_parallel_size",
    "skip_tokenizer_init",
    "trust_remote_code",
    "weight_transfer_config",
    "worker_extension_cls",
)
"""Arguments without which tokens, log-probs or weight updates would not be what they are said to be."""


def check_engine_args(field: str, names: Iterable[str]) -> None:
    """Raises InputError for a name that the installed vLLM does not have, or that is set otherwise here."""
    names = list(names)
    if not names:
        return
    known = _known()
    for name in names:
        if name in _OURS:
            raise InputError(f"{field}.{name}: is the field {_OURS[name]!r} here; set that one")
        if name in _FIXED:
            raise InputError(f"{field}.{name}: the rooms depend on the value that they give it; leave it out")
        if name not in known:
            raise InputError(f"{field}.{name}: vLLM has no such argument{near(name, known)} (its EngineArgs)")


def _known() -> set[str]:
    """The fields of EngineArgs, read in its source."""
    package = Path(find_spec("vllm").origin).parent
    module = ast.parse((package / "engine" / "arg_utils.py").read_text())
    [fields] = [node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    return {field.target.id for field in fields if isinstance(field, ast.AnnAssign)}
