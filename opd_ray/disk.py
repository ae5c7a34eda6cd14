"""Writing files: whole or not at all, and what a full disk means for a run; where what can be made again is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from opd_ray.errors import Unwritable


def cache_root() -> Path:
    """`OPD_RAY_CACHE`, or `~/.cache/opd_ray`."""
    configured = os.environ.get("OPD_RAY_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "opd_ray"


@contextlib.contextmanager
def private() -> Iterator[None]:
    """What this process writes in the block is its user's alone: 0700 and 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where the block writes what then becomes ``path``: whoever reads sees the file of before or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # it takes space that others need
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises Unwritable for an OSError of the block, which writes to ``path``."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise Unwritable(
            f"{path} cannot be written ({reason}); free some space there, or see what is wrong with its disk"
        ) from error
