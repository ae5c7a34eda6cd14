"""What travels with a job, and that no key is in it.

Ray's package of a working directory is kept by the head and lies on every node, and an image in a registry: what was in
one of them has to be made anew. Files that are keys by their names are kept out by .rayignore, .gitignore and
.dockerignore; here the others are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from opd_ray.errors import InputError

_MOST_BYTES = 2**20
"""Of a file that is read: keys lie in small ones."""
_KEYS = {
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{20}",
    "an AWS access key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}\b",
    "an OpenAI key": rb"\bsk-[A-Za-z0-9_-]{32,}\b",
}
_ANY = re.compile(b"|".join(b"(%s)" % pattern for pattern in _KEYS.values()))


def _left_out(directory: Path) -> list[str]:
    """What .rayignore names, which Ray leaves out, too."""
    lines = (directory / ".rayignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def check_upload(directory: Path) -> None:
    """Raises InputError where a file that would travel with a job holds a key."""
    for path in _files(directory, [each.rstrip("/") for each in _left_out(directory)]):
        if kind := _key_in(path):
            raise InputError(
                f"{path} holds {kind} and would be uploaded with the working directory; move it out of {directory}, or "
                "name it in .rayignore, .gitignore and .dockerignore"
            )


def _files(directory: Path, patterns: list[str]) -> Iterator[Path]:
    for where, directories, names in os.walk(directory):
        root = Path(where)

        def out(path: Path) -> bool:
            parts = (path.name, path.relative_to(directory).as_posix())
            return any(fnmatch(part, pattern) for part in parts for pattern in patterns)

        directories[:] = [name for name in directories if not out(root / name)]
        yield from (root / name for name in sorted(names) if not out(root / name))


def _key_in(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        found = _ANY.search(path.read_bytes())
    except OSError:  # Ray will say what it is
        return None
    return list(_KEYS)[found.lastindex - 1] if found else None
