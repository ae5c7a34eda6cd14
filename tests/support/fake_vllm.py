"""A fake vLLM engine of one table, with the V2 runner's log-probs of chosen tokens, which need CUDA, and its checks.

``put(monkeypatch, model)`` puts it in the place of VllmScoringEngine's; importing vLLM would spoil the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fake_server import VOCAB_SIZE, table
from opd_ray.models.vllm import Columns


class FakeVllm:
    """Answers one request a step, in the order in which they came."""

    def __init__(self, model: int = 0, *, v2: bool = True) -> None:
        self.vllm_config = SimpleNamespace(use_v2_model_runner=v2)
        self.table = table(model)
        self.added: list[tuple[str, list[int], dict[str, Any]]] = []
        """(request id, tokens, sampling) of every request."""
        self._waiting: list[tuple[str, list[int], dict[str, Any]]] = []

    def add(self, request_id: str, tokens: Sequence[int], **sampling: Any) -> None:
        request = (request_id, [int(token) for token in tokens], sampling)
        self.added.append(request)
        self._waiting.append(request)

    def step(self) -> list[Any]:
        request_id, tokens, sampling = self._waiting.pop(0)
        rows = self.table[tokens[:-1]]
        asked = sampling.get("prompt_logprobs")
        flat = None
        if asked is not None:
            named = [[token, *np.argsort(-row)[:asked]] for token, row in zip(tokens[1:], rows, strict=True)]
            values = [row[ids] for row, ids in zip(rows, named, strict=True)]
            flat = Columns(asked)
            flat.append(np.reshape(values, (-1, 1 + asked)), np.reshape(named, (-1, 1 + asked)))
        return [
            SimpleNamespace(
                request_id=request_id, prompt_logprobs=flat, prompt_token_id_logprobs=self._chosen(rows, sampling)
            )
        ]

    def _chosen(self, rows: np.ndarray, sampling: dict[str, Any]) -> np.ndarray | None:
        """As vllm/sampling_params.py and v1/engine/input_processor.py check it, and prompt_logprob.py computes it."""
        ids = sampling.get("prompt_logprob_token_ids")
        if ids is None:
            return None
        assert self.vllm_config.use_v2_model_runner
        assert ids.ndim == 2 and 0 not in ids.shape and ids.dtype.kind == "i"
        assert ids.min() >= -1 and ids.max() < VOCAB_SIZE
        rows = rows[sampling["prompt_logprob_start"] :]
        assert len(ids) == len(rows)
        return np.where(ids < 0, -np.inf, np.take_along_axis(rows, ids.clip(min=0), 1)).astype(np.float32)


def put(monkeypatch: pytest.MonkeyPatch, engine: FakeVllm) -> None:
    """Engines that are built from now on are this one."""
    from opd_ray.score import vllm

    monkeypatch.setattr(vllm, "build", lambda *_, **__: engine)
    monkeypatch.setattr(vllm, "context_limit", lambda _, limit: limit)
    monkeypatch.setattr(vllm, "vocabulary_size", lambda _: VOCAB_SIZE)
    monkeypatch.setattr(vllm, "add", lambda fake, *args, **sampling: fake.add(*args, **sampling))
