"""Where the status of a run is read: in its directory or, where its checkpoints have a URI, beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd_ray.errors import InputError, RunError
from opd_ray.status.state import FILE, NoStatus, Status, parsed, read


def status_of(where: str) -> Status:
    """Of a run directory, or of the URI of a run's checkpoints. Raises NoStatus if there is none (yet), InputError for
    what cannot be read."""
    if "://" not in where:
        return read(Path(where) / FILE)
    from opd_ray.snapshots.storage import Storage  # brings Ray, which a directory can do without

    storage = Storage(where)
    try:
        found = storage.read_if_there(FILE)
    except RunError as error:
        raise InputError(str(error)) from error
    if found is None:
        raise NoStatus(
            f"{storage.url(FILE)}: no such file; expected the checkpoint.directory of a run that has begun, with the "
            "run's name in the place of {run}"
        )
    return parsed(found, storage.url(FILE))


def runs_in(directory: Path) -> Iterator[tuple[Path, Status | None]]:
    """The runs in a directory, the newest first; None for what another version wrote. Raises InputError where there
    is no run."""
    files = [path / FILE for path in directory.iterdir()] if directory.is_dir() else []
    there = {path: path.stat().st_mtime for path in files if path.is_file()}
    if not there:
        raise InputError(
            f"{directory}: no run in it; give the directory of a run, or begin one: opd-ray train --run-dir DIR"
        )
    for path in sorted(there, key=lambda path: -there[path]):
        try:
            yield path.parent, read(path)
        except InputError:
            yield path.parent, None
