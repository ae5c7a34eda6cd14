"""What it takes to receive weights beside the steps of an engine: memory and, on CUDA, a stream of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Memory:
    """For whole broadcasts, one after another. It is kept: on CPUs bytes come into new pages at half the speed."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def of(self, sizes: Sequence[int], device: torch.device) -> list[torch.Tensor]:
        """Bytes of these sizes; the same ones as before where these were the sizes before."""
        if [(len(buffer), buffer.device) for buffer in self._buffers] != [(size, device) for size in sizes]:
            self._buffers = []  # before there are others
            self._buffers = [new_bytes(size, device) for size in sizes]
        return self._buffers

    def has_room(self, num_bytes: int, device: torch.device) -> bool:
        """Would a broadcast fit? Host memory is planned with it; on CUDA an engine may have taken all there is."""
        if device.type != "cuda":
            return True
        return sum(map(len, self._buffers)) >= num_bytes or torch.cuda.mem_get_info(device)[0] > num_bytes


def new_bytes(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """What this thread does on CUDA neither waits for what others do there nor holds it up; done when it is left."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
