"""A directory of files: a local one, or one that pyarrow.fs or fsspec opens by its URI."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from opd_ray.disk import private, whole
from opd_ray.errors import InputError, OpdError, RunError, StorageUnavailable

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")
_OBJECT_STORES = ("s3", "gcs", "abfs")
"""Where directories are only a part of the names."""
_PROBE = ".writable"
_RETRY_S = 60


@dataclass(frozen=True)
class FileFact:
    """A file as it was written."""

    name: str
    """Path below the storage's location, with slashes."""
    num_bytes: int
    crc32: int


class Storage:
    """Files below ``location``: a local path, or a URI as s3://bucket/runs, gs://, abfs://, hdfs:// or any of fsspec's.

    Opened at its first use, so it can be sent to another process. A local file is written under another name, synced
    and renamed; a remote one appears as a whole where its store has it so, as S3, GCS and Azure do. Whatever goes
    wrong is a RunError that names the file, a StorageUnavailable where it may pass by itself; a location that cannot be
    one is an InputError.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        location = os.fspath(location)
        uri = _URI.match(location)
        self.is_local = uri is None or uri[0].lower() == "file://"
        if uri and self.is_local:
            try:
                location = pafs.FileSystem.from_uri(location)[1]
            except pa.ArrowException as error:
                raise InputError(f"{location} is no path: {error}; write it as file:///DIRECTORY") from error
        # Tasks that use it run in other working directories.
        self.location = os.path.abspath(location) if self.is_local else location.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.location,)

    def url(self, name: str = "") -> str:
        """Where a file is, for messages: without passwords and options."""
        location = self.location if self.is_local else _PASSWORD.sub("", self.location).partition("?")[0]
        return f"{location}/{name}" if name else location

    def write(self, name: str, chunks: Iterable[Any]) -> FileFact:
        """Writes a file of ``chunks`` (of bytes, one after the other), over an earlier one of that name."""
        num_bytes = crc = 0

        def counted() -> Iterator[memoryview]:
            nonlocal num_bytes, crc
            for chunk in chunks:
                view = memoryview(chunk)
                num_bytes, crc = num_bytes + view.nbytes, zlib.crc32(view, crc)
                yield view

        with self._explained("be written", name):
            if self.is_local:
                _write_local(Path(self.location, name), counted())
            else:
                self._write_remote(name, counted())
        return FileFact(name, num_bytes, crc)

    def read(self, name: str) -> pa.Buffer:
        """The whole file; a local one is mapped, not loaded."""
        with self._explained("be read", name):
            filesystem, root = self._opened
            if self.is_local and os.path.getsize(f"{root}/{name}"):  # an empty file cannot be mapped
                return pa.memory_map(f"{root}/{name}").read_buffer()
            with filesystem.open_input_file(f"{root}/{name}") as file:
                return file.read_buffer()

    def read_if_there(self, name: str) -> bytes | None:
        """The whole file as it is now, None where there is none."""
        try:
            with self._explained("be read", name):
                filesystem, root = self._opened
                with filesystem.open_input_file(f"{root}/{name}") as file:
                    return file.read()
        except RunError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def verified(self, fact: FileFact, otherwise: str) -> pa.Buffer:
        """The whole file, if it is as it was written; else RunError, which ends with ``otherwise``: what to do next."""
        content = self.read(fact.name)
        if (content.size, zlib.crc32(content)) != (fact.num_bytes, fact.crc32):
            raise RunError(
                f"{self.url(fact.name)} is damaged: {content.size} bytes with CRC {zlib.crc32(content):08x}, written "
                f"were {fact.num_bytes} bytes with {fact.crc32:08x}; {otherwise}"
            )
        return content

    def list(self) -> dict[str, int | None]:
        """Name to size in bytes of every file here, at any depth, and None for a directory."""
        with self._explained("be listed", ""):
            filesystem, root = self._opened
            if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
                filesystem.handler.fs.invalidate_cache()  # others write here, too
            found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
        start = len(root.strip("/")) + 1
        return {info.path.strip("/")[start:]: info.size if info.type == pafs.FileType.File else None for info in found}

    def delete(self, name: str) -> None:
        """Deletes a file."""
        with self._explained("be deleted", name):
            filesystem, root = self._opened
            filesystem.delete_file(f"{root}/{name}")

    def delete_directory(self, name: str) -> None:
        """Deletes a directory with all that is in it."""
        with self._explained("be deleted", name):
            filesystem, root = self._opened
            filesystem.delete_dir(f"{root}/{name}")

    def probe(self) -> None:
        """Raises RunError unless files can be written, read and deleted here; leaves nothing behind."""
        path = Path(self.location)
        missing = [each for each in (path, *path.parents) if not each.exists()] if self.is_local else []
        try:
            self.write(_PROBE, [b"probe"])
            self.read(_PROBE)
            self.delete(_PROBE)
        finally:
            for directory in missing:  # the deepest first
                with contextlib.suppress(OSError):
                    directory.rmdir()

    @functools.cached_property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        """The file system, and the location in it."""
        return (pafs.LocalFileSystem(), self.location) if self.is_local else _open_uri(self.location)

    def _write_remote(self, name: str, chunks: Iterable[memoryview]) -> None:
        filesystem, root = self._opened
        path = f"{root}/{name}"
        if filesystem.type_name not in _OBJECT_STORES:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        stream = filesystem.open_output_stream(path, compression=None)
        for chunk in chunks:
            stream.write(chunk)
        stream.close()

    @contextlib.contextmanager
    def _explained(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except OpdError:
            raise
        except Exception as error:  # file systems raise what they like
            what = f"{self.url(name)} cannot {doing}"
            if lasting := _lasting_reason(error):
                raise RunError(f"{what}: {lasting}") from error
            raise StorageUnavailable(f"{what}: {_passing_reason(error)}") from error


def _write_local(path: Path, chunks: Iterable[memoryview]) -> None:
    new_directory = not path.parent.is_dir()
    with private():
        os.makedirs(path.parent, exist_ok=True)
    with whole(path) as partial, open(partial, "wb", opener=_private) as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    # A power failure must not take back a name after what it replaces was deleted.
    for directory in (path.parent, path.parent.parent) if new_directory else (path.parent,):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_RETRY_S}"  # its own limit is a quarter of an hour
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a scheme that it does not know, or was built without
        import fsspec

        opened, path = fsspec.core.url_to_fs(uri)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(opened))
    return filesystem, path.rstrip("/")


def _lasting_reason(error: Exception) -> str | None:
    """Why a file operation failed, and what to do about it, where it would fail again; None where that is not known."""
    code = getattr(error, "errno", None)
    elsewhere = "put it elsewhere (checkpoint.directory, --run-dir)"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space is left ({os.strerror(code)}); free some there, or {elsewhere}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        return f"not permitted ({os.strerror(code) if code else error}); grant it, or {elsewhere}"
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR) or isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"a file is where a directory is needed, or the other way round; move it away, or {elsewhere}"
    if isinstance(error, FileNotFoundError):
        return "it is not there; look whether the location is right and what has deleted it"
    if isinstance(error, ImportError):
        return f"{error}; install that package on every node"
    return None


def _passing_reason(error: Exception) -> str:
    text = _PASSWORD.sub("", str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{text[:300]}; check the location, that its host is up, and this node's credentials for it"
