"""What is under way at the same time in a broadcast, and the memory that it comes into."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup
from opd_ray.weights import transfer
from opd_ray.weights.beside import Memory
from opd_ray.weights.manifest import manifest_of
from opd_ray.weights.transfer import WeightTransfer

CPU = torch.device("cpu")


class FakeWire:
    """Writes down what it is told."""

    device = CPU

    def __init__(self, broken_at: int | None = None) -> None:
        self.journal: list[str] = []
        self._broken_at, self._num_finished = broken_at, 0

    def start(self, tensor: torch.Tensor) -> None:
        self.journal.append(f"start {tensor.numel() * tensor.itemsize}")

    def settle(self) -> None:
        pass

    def finish(self) -> None:
        self._num_finished += 1
        if self._num_finished - 1 == self._broken_at:
            raise RuntimeError("the connection broke")
        self.journal.append("finish")

    def close(self) -> None:
        self.journal.append("close")


def sent(monkeypatch: pytest.MonkeyPatch, wire: FakeWire, sizes: list[int], bucket_bytes: int) -> None:
    """Sends parameters of so many bytes; the journal has when each is asked for."""
    weights = [(str(number), torch.zeros(size // 4)) for number, size in enumerate(sizes)]

    def asked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            wire.journal.append(f"ask {name}")
            yield name, tensor

    monkeypatch.setattr(transfer, "join", lambda group: wire)
    sender = WeightTransfer()
    sender.connect(TransferGroup("gloo", "127.0.0.1", 1, 0, 2, 1.0, bucket_bytes, "00"))
    sender.send(manifest_of(weights, 1), asked())


def test_a_bucket_is_copied_together_while_the_one_before_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = FakeWire()
    sent(monkeypatch, wire, [64, 64, 64, 64, 64], bucket_bytes=128)
    first, second, third = (["ask 0", "ask 1", "start 128"], ["ask 2", "ask 3", "start 128"], ["ask 4", "start 64"])
    assert wire.journal == ["start 16", "finish", *first, *second, "finish", *third, "finish", "finish"]


def test_a_parameter_that_travels_from_where_it_is_holds_until_it_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 it is gone when the next is asked for."""
    wire = FakeWire()
    sent(monkeypatch, wire, [64, 256, 64], bucket_bytes=128)
    small, large = ["ask 0", "start 64"], ["ask 1", "start 256", "finish", "finish"]
    assert wire.journal == ["start 16", "finish", *small, *large, "ask 2", "start 64", "finish"]


@pytest.mark.parametrize("broken_at", [0, 1, 2, 3])
def test_one_that_breaks_asks_for_no_more_and_leaves_the_group(monkeypatch, broken_at: int) -> None:
    wire = FakeWire(broken_at)
    with pytest.raises(WeightSyncError, match=f"could not send {('the header', '0', '1', '2')[broken_at]} "):
        sent(monkeypatch, wire, [128, 128, 128], bucket_bytes=128)
    assert wire.journal[-1] == "close"
    assert sum(entry.startswith("ask") for entry in wire.journal) == (0, 2, 3, 3)[broken_at]


def test_memory_is_kept_for_the_next_broadcast_of_the_same_sizes() -> None:
    memory = Memory()
    first = memory.of([64, 16], CPU)
    assert [len(buffer) for buffer in first] == [64, 16]
    assert memory.of([64, 16], CPU) is first
    assert [len(buffer) for buffer in memory.of([32], CPU)] == [32]
