"""Checkpoints: the state of a run at a step boundary, in memory and on disk."""

from opd_ray.snapshots.files import read_arrays, read_batch, write_arrays, write_batch, write_files
from opd_ray.snapshots.lease import Lease
from opd_ray.snapshots.shelf import Checkpoint, Shelf
from opd_ray.snapshots.snapshot import Snapshot
from opd_ray.snapshots.storage import FileFact, Storage

__all__ = [
    "Checkpoint",
    "FileFact",
    "Lease",
    "Shelf",
    "Snapshot",
    "Storage",
    "read_arrays",
    "read_batch",
    "write_arrays",
    "write_batch",
    "write_files",
]
