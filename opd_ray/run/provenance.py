"""What a run was made with, for whoever finds its directory later: command, commit, packages, hardware."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from opd_ray.config.keys import without_keys
from opd_ray.placement.nodes import Node, nodes
from opd_ray.rooms.node import versions

_PACKAGE = Path(__file__).parents[1]
_GIT_S = 10.0
_MOST_CHARS = 2000
_ACCELERATOR = "accelerator_type:"
"""Begins the name of the resource by which Ray says which kind of GPU a node has."""


def provenance() -> dict[str, Any]:
    """Plain values; ``commit`` is None where the package does not lie in a checkout, as in a job's upload."""
    return {"command": command(), "commit": commit(), "versions": versions(), "hardware": hardware(nodes())}


def command() -> str:
    """As it was typed, but for keys in addresses and the interpreter's directory."""
    interpreter, *rest = sys.orig_argv
    return shlex.join([Path(interpreter).name, *map(without_keys, rest)])[:_MOST_CHARS]


@functools.cache
def commit() -> str | None:
    """The checkout's, and whether it was changed since."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # a checkout of this, not of what it was installed in
        return _git("rev-parse", "HEAD") + (" and changes" if _git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=_GIT_S, check=True)
    return done.stdout.strip()


def hardware(there: list[Node]) -> list[str]:
    """A line for each kind of node, as "2 nodes of 8 CPUs, 4 GPUs (H100), 62 GB for processes"."""
    kinds = Counter(map(_kind, there))
    return [f"{number} node{'' if number == 1 else 's'} of {kind}" for kind, number in kinds.items()]


def _kind(node: Node) -> str:
    names = ", ".join(
        sorted(name.removeprefix(_ACCELERATOR) for name in node.resources if name.startswith(_ACCELERATOR))
    )
    gpus = f"{node.gpus:g} GPUs" + (f" ({names})" if names else "")
    parts = [f"{node.cpus:g} CPUs", *([gpus] if node.gpus else []), f"{node.memory_bytes / 1e9:.0f} GB for processes"]
    return ", ".join(parts)
