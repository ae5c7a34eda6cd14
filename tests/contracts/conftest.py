"""Fixtures of the contract tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_host import EngineHost


@pytest.fixture(scope="session")
def vllm_host() -> Iterator[EngineHost]:
    """One process for every vLLM engine of the session: importing vLLM takes most of their start."""
    host = EngineHost()
    yield host
    host.close()
