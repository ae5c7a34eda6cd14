"""How much memory this process has needed, its children included (a judge's, those of tensor parallelism); and a bound
on what its CPU kernels take of it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

from opd_ray.messages import MemoryUse

KERNEL_CACHES = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "384")
"""How many compiled kernels a process keeps, by oneDNN's variable and by that of PyTorch's own cache in front of it.

On CPUs oneDNN compiles one for every matrix and every number of tokens that it meets, .5 to .7 MB each, and keeps
1,024: generators grew by half a gigabyte over some hundred weight updates, because the prefixes that these recompute
have ever new lengths. This is enough for a decoder's five kinds of matrices at 64 batch sizes, which come again and
again; what is met once, as most prefills are, takes a millisecond to compile.
"""
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""glibc's: what is freed stays in the process, up to 256 MiB. By default it goes back to the kernel after every few
layers and comes again page by page: 7,000 faults for 8 rollouts, a tenth of a small scorer's time."""


def own_memory() -> MemoryUse:
    """Since the process began."""
    this = psutil.Process()
    return MemoryUse(sum(map(_peak_bytes, [this, *this.children(recursive=True)])), _gpu_bytes())


def resident_bytes() -> int:
    """Of this process, now."""
    return psutil.Process().memory_info().rss


def _peak_bytes(process: psutil.Process) -> int:
    """Anonymous pages and its share of mapped files, at their most; the object store, which all processes of a node map
    into their memory, is left out."""
    try:
        if not sys.platform.startswith("linux"):
            return process.memory_full_info().uss
        place = Path("/proc") / str(process.pid)
        now, status = _kilobytes(place / "smaps_rollup"), _kilobytes(place / "status")
    except (psutil.Error, OSError):  # it ended between the listing and the look
        return 0
    given_back = status["VmHWM"] - status["VmRSS"]  # only the most of all pages together is kept count of
    return 1024 * (now["Pss"] - now.get("Pss_Shmem", 0) + max(0, given_back))


def _kilobytes(file: Path) -> dict[str, int]:
    found = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            with contextlib.suppress(ValueError):
                found[name] = int(value.removesuffix(" kB"))
    return found


def _gpu_bytes() -> int | None:
    """What PyTorch has taken of this process's GPU; None where it has not touched one (an engine that spans several
    GPUs has its workers in processes of their own)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_reserved()
