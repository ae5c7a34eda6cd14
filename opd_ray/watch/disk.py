"""Writing into the run directory, whose disk may be full: then the run ends in one line that says so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from opd_ray.errors import Unwritable


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
