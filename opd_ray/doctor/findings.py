"""What the answers of nodes mean, and what to do about them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_ray.doctor.inspector import NodeReport
from opd_ray.plan.fit import gigabytes

_LEAST_DRIVER = 580
"""For CUDA 13, whose runtime vLLM 0.32's wheel links (NVIDIA's table of CUDA releases and drivers)."""
_MOST_SKEW_S = 2.0
"""The lease of a checkpoint directory counts a minute (opd_ray/snapshots/lease.py), logs are put in order by clocks."""
_LEAST_OPEN_FILES = 8192
"""A driver or raylet holds a few for each actor and worker; Ray asks for as many as it may have."""
_LEAST_STORE_BYTES_PER_S = 100e6
"""Ten gigabit have 1 250; below this a step's payloads take longer than its training."""
_LEAST_DISK_BYTES_PER_S = 50e6
_LEAST_DISK_BYTES = 5e9
_MOST_NATS = {"float32": 1e-3, "bfloat16": 0.25}
"""Between two implementations of one model, at its precision: as the contract of engines and
learn/objective.py's check of output layers have it."""
_MOST_NATS_TWICE = {"float32": 1e-5, "bfloat16": 0.05}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    text: str
    """What was found."""
    mend: str = ""
    """What to do; empty where all is well."""

    @property
    def ok(self) -> bool:
        return not self.mend

    def __str__(self) -> str:
        return f"ok {self.check}: {self.text}" if self.ok else f"{self.check}: {self.text}: {self.mend}"


def drivers(reports: Mapping[str, NodeReport]) -> Finding:
    """Of every node with GPUs, by node."""
    found = {name: report.cards[0].driver for name, report in reports.items() if report.cards}
    if not found:
        return Finding("driver", "no node has a GPU that nvidia-smi knows")
    if len(set(found.values())) > 1:
        return Finding("driver", _by_value(found), "install one driver on all nodes")
    driver = next(iter(found.values()))
    release = driver.partition(".")[0]  # no number where nvidia-smi does not know it
    is_old = release.isdigit() and int(release) < _LEAST_DRIVER
    if is_old and any("vllm" in reports[name].packages for name in found):
        return Finding("driver", f"{driver}, but vLLM's wheel needs CUDA 13", f"install {_LEAST_DRIVER} or newer")
    builds = {name: reports[name].packages.get("torch", "none") for name in found}
    if cpu := [name for name, build in builds.items() if build == "none" or build.endswith("+cpu")]:
        text = f"torch {builds[cpu[0]]} on {cpu[0]}, which has GPUs"
        return Finding("driver", text, "install opd_ray[gpu,deepspeed] there, without the CPU build of torch")
    cards = ", ".join(f"{len(reports[name].cards)} x {reports[name].cards[0].name} on {name}" for name in found)
    return Finding("driver", f"{driver}, torch {', '.join(sorted(set(builds.values())))}, {cards}")


def packages(reports: Mapping[str, NodeReport], driver: str, here: NodeReport) -> Finding:
    """``here``: the report of the driver's own process, called ``driver``."""
    for name, report in reports.items():
        for package in sorted(here.packages.keys() | report.packages.keys()):
            ours, theirs = here.packages.get(package, "none"), report.packages.get(package, "none")
            if ours != theirs:
                text = f"{package} is {theirs} on {name}, {ours} in {driver}"
                return Finding("packages", text, "build all nodes from one image or environment")
    return Finding("packages", f"{len(here.packages)} main ones are the same on {_nodes(len(reports))}")


def clocks(skews: Mapping[str, tuple[float, float]]) -> Finding:
    """By node: seconds that its clock is ahead of the driver's, and how far that may be wrong."""
    name, (skew, error) = max(skews.items(), key=lambda item: abs(item[1][0]) - item[1][1])
    if abs(skew) - error > _MOST_SKEW_S:
        ahead = "ahead of" if skew > 0 else "behind"
        return Finding("clocks", f"{name} is {abs(skew):.1f} s {ahead} the driver", "run an NTP client on every node")
    return Finding("clocks", f"within {max(abs(skew) + error for skew, error in skews.values()):.3f} s")


def limits(reports: Mapping[str, NodeReport], store_bytes: Mapping[str, float]) -> list[Finding]:
    """``store_bytes``: of each node's object store."""
    name, least = min(((name, report.open_files) for name, report in reports.items()), key=lambda item: item[1])
    files = Finding("open files", "no limit" if math.isinf(least) else f"{least:,} for a process")
    if least < _LEAST_OPEN_FILES:
        files = Finding("open files", f"{least:,} for a process on {name}", "start Ray there after `ulimit -n 65535`")
    shm = Finding("shared memory", "/dev/shm holds every node's object store")
    for name, report in reports.items():
        if report.shm_bytes < store_bytes[name]:
            text = (
                f"/dev/shm of {name} has {gigabytes(report.shm_bytes)}, its object store {gigabytes(store_bytes[name])}"
            )
            mend = "give its container a larger one (docker --shm-size, an emptyDir of medium Memory): Ray uses a disk"
            shm = Finding("shared memory", text, mend)
    return [files, shm]


def store(rates: Mapping[tuple[str, str], float]) -> Finding:
    """Bytes a second from one node's object store into a process of another."""
    (giver, taker), slowest = min(rates.items(), key=lambda item: item[1])
    text = f"{gigabytes(slowest)}/s from {giver} to {taker}" + (", the slowest of all pairs" if len(rates) > 1 else "")
    if slowest < _LEAST_STORE_BYTES_PER_S:
        return Finding("object store", text, "see whether Ray's node addresses are on the fast network")
    return Finding("object store", text)


def disk(where: str, bytes_per_s: float, free_bytes: float | None) -> Finding:
    """``free_bytes``: None of a storage that tells none."""
    text = f"{gigabytes(bytes_per_s)}/s to {where}"
    if free_bytes is not None:
        text += f", {gigabytes(free_bytes)} free"
        if free_bytes < _LEAST_DISK_BYTES:
            mend = "free some space there, or give another directory: a checkpoint has 12 bytes for every parameter"
            return Finding("disk", text, mend)
    if bytes_per_s < _LEAST_DISK_BYTES_PER_S:
        return Finding("disk", text, "give a faster directory, or save less often (checkpoint.every_steps)")
    return Finding("disk", text)


def engine(differences: Mapping[str, float], name: str, dtype: str) -> Finding:
    """By node: nats between an engine's log-probs and those of transformers."""
    node, largest = _largest(differences)
    text = f"{name} and transformers differ by {largest:.1e} nats in {dtype}"
    if not largest <= _MOST_NATS[dtype]:
        mend = f"install the version of {name} that pyproject.toml asks for, or set rollout.engine=torch"
        return Finding("engine", f"{text} on {node}", mend)
    return Finding("engine", f"{text} at most, on {_nodes(len(differences))}")


def teacher(differences: Mapping[str, float], name: str, dtype: str) -> Finding:
    """By node: nats between a scorer's two answers to one request."""
    node, largest = _largest(differences)
    text = f"two answers of {name} to one request differ by {largest:.1e} nats in {dtype}"
    if not largest <= _MOST_NATS_TWICE[dtype]:
        return Finding("teacher", f"{text} on {node}", "look for a faulty device, or set teacher.dtype=float32")
    return Finding("teacher", f"{text} at most, on {_nodes(len(differences))}")


def _largest(differences: Mapping[str, float]) -> tuple[str, float]:
    """What is not a number is larger than any."""
    return max(differences.items(), key=lambda item: (math.isnan(item[1]), item[1]))


def _by_value(found: Mapping[str, str]) -> str:
    return ", ".join(f"{value} on {name}" for name, value in found.items())


def _nodes(number: int) -> str:
    return "one node" if number == 1 else f"all {number} nodes"


def tournament(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rounds in which every pair of members meets once and nobody twice in one round (the circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds
