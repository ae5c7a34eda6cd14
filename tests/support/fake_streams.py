"""CUDA streams, ZeRO-3's gathering and a wire that only write down, in order, what is done on which stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

SIDE, DEFAULT = "side", "default"


@dataclass
class FakeStreams:
    """What one rank does; its thread begins on a side stream, as where vLLM has given it one."""

    journal: list[tuple[str, ...]] = field(default_factory=list)
    """(what, with what, on which stream)."""
    current: str = SIDE
    broken_at: int | None = None
    """The broadcast that fails, counted from 0."""
    device = torch.device("cpu")
    _num_broadcasts: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the place of torch's streams and of DeepSpeed."""
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(synchronize=self._wait))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self._on_default())
        monkeypatch.setitem(__import__("sys").modules, "deepspeed", SimpleNamespace(zero=self))

    def split(self, model: torch.nn.Module) -> torch.nn.Module:
        """As ZeRO-3 leaves it: every parameter empty, with the shape that it would have."""
        self._names = {}
        for name, parameter in model.named_parameters():
            self._names[id(parameter)] = name
            parameter.ds_shape, parameter.whole, parameter.data = parameter.shape, parameter.data, torch.empty(0)
        return model

    @contextmanager
    def GatheredParameters(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:  # noqa: N802
        names = "+".join(self._names[id(parameter)] for parameter in parameters)
        self._note("gather", names)
        for parameter in parameters:
            parameter.data = parameter.whole
        yield
        self._note("release", names)
        for parameter in parameters:
            parameter.data = torch.empty(0)

    def start(self, tensor: torch.Tensor) -> None:
        """As a wire, of NCCL."""
        self._num_broadcasts += 1
        if self.broken_at == self._num_broadcasts - 1:
            raise RuntimeError("the connection broke")
        self._note("broadcast", str(tensor.numel() * tensor.itemsize))

    def finish(self) -> None:
        """As a wire."""

    def settle(self) -> None:
        """As a wire."""

    def close(self) -> None:
        """As a wire."""

    def _wait(self) -> None:
        self._note("wait", "")

    @contextmanager
    def _on_default(self) -> Iterator[None]:
        before, self.current = self.current, DEFAULT
        yield
        self.current = before

    def _note(self, what: str, with_what: str) -> None:
        self.journal.append((what, with_what, self.current))
