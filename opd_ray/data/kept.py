"""Tokens and verdicts of many rows, kept by content: the next run on the same rows reads them.

Each lies in the cache under a digest of all that decides it. A file that is broken or half written is as good as none,
and one that nobody has read for a month is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.disk import cache_root, whole

FEW = 256
_UNREAD_S = 30 * 86_400.0


def key(*parts: str) -> str:
    """The name of what ``parts`` decide."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def versions(*packages: str) -> str:
    """Which are installed."""
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def find(name: str, kind: pa.DataType, count: int) -> pa.Array | None:
    """The ``count`` values that were kept under this key; None where nothing was, or not that: checksums are of the
    pages alone."""
    path = _path(name)
    try:
        found = pq.read_table(path, page_checksum_verification=True)["value"].combine_chunks().cast(kind)
        if len(found) != count:
            return None
        os.utime(path)
        return found
    except (OSError, KeyError, pa.ArrowException):
        return None


def keep(name: str, values: pa.Array) -> None:
    """Keeps them, unless they are few, which are made in seconds, or the disk will not have them."""
    if len(values) < FEW:
        return
    path = _path(name)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            if time.time() - other.stat().st_mtime > _UNREAD_S:
                other.unlink()
        with whole(path) as partial:
            pq.write_table(pa.table({"value": values}), partial, compression="zstd", write_page_checksum=True)


def _path(name: str) -> Path:
    return cache_root() / "golden" / f"{name}.parquet"
