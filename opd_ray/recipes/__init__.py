"""The methods of the literature as configurations, one YAML file each; ``opd-ray init`` writes one to be edited."""

from __future__ import annotations

import re
from pathlib import Path

from opd_ray.config.commented import commented
from opd_ray.errors import InputError, near

_HERE = Path(__file__).parent
_DATA_FILE = re.compile(r"opd_ray/recipes/([\w.]+\.jsonl)")
"""Data that comes with a recipe, as the recipe names it from the root of the checkout."""


def purposes() -> dict[str, str]:
    """Every recipe by name, with the first line of its head."""
    return {path.stem: _text(path.stem).partition("\n")[0].removeprefix("# ") for path in sorted(_HERE.glob("*.yaml"))}


def write(name: str, out: Path, *, force: bool = False) -> None:
    """Writes the recipe ``name`` with every field to ``out``, and beside it the data files that it names.

    Raises InputError for an unknown name, and where another file is in the way and ``force`` does not say to write
    over it.
    """
    if name not in purposes():
        raise InputError(f"init: there is no recipe '{name}'{near(name, purposes())}")
    recipe = _text(name)
    data = {out.parent / file: (_HERE / file).read_text(encoding="utf-8") for file in _DATA_FILE.findall(recipe)}
    beside = _DATA_FILE.sub(lambda found: (out.parent / found[1]).as_posix(), recipe)
    try:
        files = data | {out: commented(beside, f"Written by `opd-ray init {name}`.")}
        for path, text in files.items():
            if not force and path.exists() and path.read_text(encoding="utf-8") != text:
                raise InputError(f"init: {path} is there already; give another --out, or --force to write over it")
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"init: {error.filename}: {error.strerror}; give --out a file that can be written") from None


def _text(name: str) -> str:
    return (_HERE / f"{name}.yaml").read_text(encoding="utf-8")
