"""Fixtures that more than one directory of tests uses."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from preloaded_workers import preloaded

os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
"""Actors have environments of their own: workers that Ray starts for whoever may come are never used."""
settings.register_profile("same every time", derandomize=True, deadline=None)  # on a busy machine none holds
settings.load_profile("same every time")

MEMORY, LEAST_BYTES = Path("/dev/shm"), 4 * 2**30


def _keep_files_in_memory() -> None:
    """Tests' directories, where there is room and programs may be executed: runs sync whatever must outlive a crash,
    which takes a disk 8 ms, 50 times in a run of six steps."""
    if MEMORY.is_dir():
        place = os.statvfs(MEMORY)
        if place.f_bavail * place.f_frsize >= LEAST_BYTES and not place.f_flag & os.ST_NOEXEC:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


_keep_files_in_memory()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: nobody looks for garbage in it meanwhile, nor afterwards, which took 0.1 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


VOCAB_SIZE = 32
MAX_CONTEXT_TOKENS = 96


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint directories of random 2-layer Qwen3 models, "tied" and "untied" (embeddings)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("tiny_model")
    for seed, name in enumerate(("untied", "tied")):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,  # vLLM's CPU attention refuses smaller heads
            max_position_embeddings=MAX_CONTEXT_TOKENS,
            initializer_range=0.2,  # the default gives distributions too flat to tell mistakes from noise
            tie_word_embeddings=name == "tied",
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        Qwen3ForCausalLM(config).save_pretrained(root / name)
    return {name: root / name for name in ("untied", "tied")}


@pytest.fixture(scope="session")
def preloaded_python() -> Iterator[str]:
    """The command of a Python that has imported torch, transformers and vLLM before it starts."""
    with preloaded() as executable:
        yield executable
