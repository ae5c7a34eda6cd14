"""Fixtures of the contract tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_host import EngineHost
from vllm_servers import VllmServers


@pytest.fixture(scope="session")
def vllm_host(preloaded_python: str) -> Iterator[EngineHost]:
    """One process for every vLLM engine of the session."""
    host = EngineHost(preloaded_python)
    yield host
    host.close()


@pytest.fixture(scope="session")
def tiny_servers(
    tiny_model: dict[str, Path], preloaded_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServers]:
    """Two vLLM servers of the untied model, with a tokenizer that they need and models do not, and a key."""
    from tiny_checkpoints import CHARACTERS, make_checkpoint  # here: who hands tests out has no use for transformers

    path = tmp_path_factory.mktemp("served") / "model"
    make_checkpoint(path, tokens=[*CHARACTERS, *"cdefghijkl"], eos=[1, 2])
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model["untied"] / file, path)
    with VllmServers([path, path], python=preloaded_python, max_model_len=97, key="s3cret") as servers:
        yield servers
