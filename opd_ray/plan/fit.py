"""Which process lies where, and whether it fits: on GPUs first come, first placed, as Ray does. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd_ray.plan.memory import BASE_BYTES, Process

_ALMOST = 1e-6


@dataclass
class Gpu:
    """One GPU and what is placed on it."""

    left: float = 1.0
    """Share that nobody has reserved."""
    rooms: list[Process] = field(default_factory=list)

    def bytes(self, card_bytes: float | None) -> float:
        """What they need together; an engine that takes a share of the card takes that, if the card is known."""
        return sum(max(each.bytes, (each.takes_share or 0.0) * (card_bytes or 0.0)) for each in self.rooms)


def gpus(processes: Sequence[Process]) -> list[Gpu]:
    """The GPUs that the rooms fill, each process on the first that has room for its share."""
    found: list[Gpu] = []
    for process in (each for each in processes if each.gpus):
        whole = process.gpus >= 1
        for _ in range(process.number * (round(process.gpus) if whole else 1)):
            share = 1.0 if whole else process.gpus
            place = next((gpu for gpu in found if gpu.left >= share - _ALMOST), None)
            if place is None:
                found.append(place := Gpu())
            place.left -= share
            place.rooms.append(process)
    return found


def host_bytes(processes: Sequence[Process]) -> float:
    """Of the memory of all nodes together: every process, the driver and Ray itself."""
    rooms = sum(each.number * each.host_bytes for each in processes)
    return rooms + BASE_BYTES["driver"] + BASE_BYTES["ray"]


def problems(
    processes: Sequence[Process],
    store: Mapping[str, float],
    *,
    memory_bytes: float,
    store_bytes: float,
    card_bytes: Sequence[float],
) -> list[str]:
    """What does not fit, a sentence each. ``memory_bytes`` and ``store_bytes`` are those of all nodes, ``card_bytes``
    the GPUs', largest first; empty where nothing is known of them."""
    found = []
    if (asked := host_bytes(processes)) > memory_bytes:
        found.append(
            f"the processes need {gigabytes(asked)} of memory, the nodes have {gigabytes(memory_bytes)} beside the "
            "object store: add nodes, start fewer workers, or take smaller models"
        )
    if (asked := sum(store.values())) > store_bytes:
        largest = max(store, key=lambda name: store[name])
        mend = (
            "set checkpoint.memory_every_steps=0, or give Ray more (ray start --object-store-memory)"
            if largest == "snapshots"
            else "lower buffer.max_staleness or a top_k, or give Ray more (ray start --object-store-memory)"
        )
        found.append(
            f"the object store needs {gigabytes(asked)} ({largest} {gigabytes(store[largest])}), the nodes have "
            f"{gigabytes(store_bytes)}: {mend}"
        )
    placed = gpus(processes)
    if card_bytes and len(placed) > len(card_bytes):
        found.append(f"the rooms fill {len(placed)} GPUs, the nodes have {len(card_bytes)}")
    for number, (gpu, has) in enumerate(zip(placed, card_bytes, strict=False), start=1):
        for each in gpu.rooms:
            if each.takes_share is not None and each.bytes > each.takes_share * has:
                found.append(
                    f"{each.room} takes {gigabytes(each.takes_share * has)} of GPU {number}, but needs "
                    f"{gigabytes(each.bytes)} with one whole response: raise its gpu_memory_utilization or "
                    "tensor_parallel_size, or take a smaller model"
                )
        if (asked := gpu.bytes(has)) > has:
            rooms = " + ".join(f"{each.room} {gigabytes(each.bytes)}" for each in gpu.rooms)
            found.append(
                f"GPU {number} would hold {gigabytes(asked)} ({rooms}) of {gigabytes(has)}: see the parts; lower "
                "learner.micro_batch_tokens or a scorer's max_batch_tokens, take gradient_checkpointing, a "
                "higher zero_stage, more ranks, or a GPU of its own"
            )
    return found


def gigabytes(number: float) -> str:
    """``20.6 GB``; small amounts in megabytes."""
    return f"{number / 1e9:,.1f} GB" if number >= 0.95e9 else f"{number / 1e6:,.1f} MB"
