"""Where rows come from, by how a source is written.

problems.jsonl, problems.parquet              a file
reasoning_gym:NAME?size=2000&seed=1           problems that the library makes up
org/name[/config]:split[@revision]            a data set of the Hugging Face Hub
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd_ray.data import files, hub
from opd_ray.tasks import reasoning_gym


def read(source: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Numbers, from 1, and unchecked rows of a source; of formats with columns those of ``columns`` that are there.

    Raises InputError that names the source.
    """
    if source.startswith(f"{reasoning_gym.SOURCE}:"):
        return enumerate(reasoning_gym.rows(source), start=1)
    if hub.is_hub(source) and not os.path.exists(source):
        return hub.read(source, columns)
    return files.read(Path(source), columns)
