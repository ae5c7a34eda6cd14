"""Files of checkpoints: whole or not at all, told apart when damaged, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import pickle
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from opd_ray.errors import InputError, RunError
from opd_ray.snapshots import (
    FileFact,
    Storage,
    read_arrays,
    read_batch,
    storage,
    write_arrays,
    write_batch,
    write_files,
)

ARRAYS = {
    "half": np.arange(3, dtype=np.float16),
    "bytes": np.arange(5, dtype=np.uint8),
    "double": np.linspace(-1, 1, 7),
    "single": np.arange(12, dtype=np.float32).reshape(3, 4),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "number": np.array(-3, np.int32),
    "empty": np.zeros((0, 2), np.int64),
    "mask": np.array([True, False]),
}


@pytest.fixture(params=["directory", "file URI", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local directory, one by its URI, and an object store as fsspec opens it."""
    memory = f"memory://{uuid.uuid4().hex}/runs"
    return Storage({"directory": tmp_path / "a", "file URI": f"file://{tmp_path}/b", "memory": memory}[request.param])


def failing(code: int):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


class TestFiles:
    def test_what_was_written_is_listed_read_and_deleted(self, place: Storage) -> None:
        fact = place.write("step-1/x", [b"abc", np.arange(3, dtype=np.uint8), b""])
        place.write("y", [])
        assert fact == FileFact("step-1/x", 6, fact.crc32)
        assert place.list() == {"step-1": None, "step-1/x": 6, "y": 0}
        assert bytes(place.read("step-1/x")) == b"abc\0\1\2"
        assert bytes(place.verified(fact, "")) == b"abc\0\1\2"
        place.write("step-1/x", [b"new"])
        assert bytes(place.read("step-1/x")) == b"new"
        place.delete("y")
        place.delete_directory("step-1")
        assert place.list() == {}

    def test_nothing_is_there_before_the_first_file(self, place: Storage) -> None:
        assert place.list() == {}

    def test_a_probe_leaves_nothing_behind(self, tmp_path: Path) -> None:
        Storage(tmp_path / "a" / "b").probe()
        assert list(tmp_path.iterdir()) == []

    def test_it_travels_without_what_it_has_opened(self, place: Storage) -> None:
        place.write("x", [b"abc"])
        again = pickle.loads(pickle.dumps(place))
        assert (again.location, again.is_local, bytes(again.read("x"))) == (place.location, place.is_local, b"abc")

    def test_a_relative_path_is_of_this_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert Storage("runs/1").location == str(tmp_path / "runs" / "1")

    def test_a_local_file_that_is_interrupted_anywhere_is_the_old_or_the_new_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(BaseException):
            pass

        survivors = set()
        for moment in range(20):
            place, left = Storage(tmp_path / str(moment)), moment
            place.write("x", [b"old"])

            def step(function):
                def run(*args, **options):
                    nonlocal left
                    if left == 0:
                        raise Killed
                    left -= 1
                    return function(*args, **options)

                return run

            def chunks():
                for half in (b"ne", b"w"):
                    yield step(lambda half: half)(half)

            with monkeypatch.context() as patched:
                for name in ("makedirs", "fsync", "replace", "open"):
                    patched.setattr(storage.os, name, step(getattr(os, name)))
                try:
                    place.write("x", chunks())
                    break
                except Killed:
                    pass
            survivors.add(bytes(place.read("x")))
            place.write("x", [b"next"])
            assert place.list() == {"x": 4}
        assert survivors == {b"old", b"new"}
        assert moment > 5


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (errno.ENOSPC, r"no space is left \(No space left on device\); free some there, or put it elsewhere"),
            (errno.EDQUOT, "no space is left .*; free some there"),
            (errno.EROFS, r"not permitted \(Read-only file system\); grant it, or put it elsewhere"),
            (errno.EACCES, r"not permitted \(Permission denied\); grant it"),
            (errno.EIO, "Input/output error; check the location, that its host is up"),
        ],
    )
    def test_one_that_cannot_be_written_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
    ) -> None:
        place = Storage(tmp_path)
        place.write("x", [b"old"])
        monkeypatch.setattr(storage.os, "fsync", failing(code))
        with pytest.raises(RunError, match=rf"{tmp_path}/x cannot be written: .*{message}"):
            place.write("x", [b"new"])
        assert place.list() == {"x": 3}
        assert bytes(place.read("x")) == b"old"

    def test_a_file_in_the_place_of_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for location in ("file", "file/deeper"):
            with pytest.raises(RunError, match="cannot be written: a file is where a directory is needed"):
                Storage(tmp_path / location).probe()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_file_that_is_not_there(self, place: Storage) -> None:
        for operation in (place.read, place.delete):
            with pytest.raises(RunError, match=r"missing cannot be .*: it is not there; look whether the location"):
                operation("missing")

    def test_an_unknown_scheme(self) -> None:
        with pytest.raises(RunError, match=r"cloud://x/y/z cannot be written: .*cloud.*; check the location"):
            Storage("cloud://x/y").write("z", [])

    def test_a_file_of_another_host(self) -> None:
        with pytest.raises(InputError, match=r"file://host/runs is no path: .*; write it as file:///DIRECTORY"):
            Storage("file://host/runs")

    def test_a_package_that_is_not_installed(self) -> None:
        fsspec.register_implementation("notthere", "not_there.FileSystem", True, "not_there is needed")
        with pytest.raises(RunError, match=r"be written: not_there is needed; install that package on every node"):
            Storage("notthere://x/y").write("z", [])

    def test_a_store_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(uri):
            raise OSError("AWS Error NETWORK_CONNECTION\nmore")

        monkeypatch.setattr(storage, "_open_uri", unreachable)
        with pytest.raises(RunError, match=r"^s3://b/k cannot be listed: AWS Error NETWORK_CONNECTION; check the loc"):
            Storage("s3://b/k").list()

    def test_passwords_are_not_said(self) -> None:
        assert Storage("s3://key:secret@bucket/runs?region=x").url("step-1") == "s3://bucket/runs/step-1"
        assert Storage("abfs://container@account/runs").url() == "abfs://container@account/runs"
        with pytest.raises(
            RunError, match="^cloud://bucket/runs/x cannot be read: Protocol not known: cloud"
        ) as caught:
            Storage("cloud://key:secret@bucket/runs").read("x")
        assert "secret" not in str(caught.value)
        assert Storage("/runs/what?://a:b@c").url() == "/runs/what?:/a:b@c"

    @pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:5] + b"!" + content[6:]])
    def test_a_damaged_file_is_told(self, place: Storage, damage) -> None:
        fact = write_arrays(place, "x", ARRAYS)
        content = damage(bytes(place.read("x")))
        place.write("x", [content])
        expected = rf"x is damaged: {len(content)} bytes with CRC .*, written were {fact.num_bytes} bytes .*; do this"
        for read in (read_arrays, read_batch):
            with pytest.raises(RunError, match=expected):
                read(place, fact, "do this")


class TestArrays:
    def test_they_come_back_as_they_were(self, place: Storage) -> None:
        back = read_arrays(place, write_arrays(place, "x", ARRAYS), "")
        assert back.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(back[name], array)
            assert back[name].flags.aligned

    def test_others_can_read_and_have_written_the_file(self, tmp_path: Path) -> None:
        write_arrays(Storage(tmp_path), "ours", ARRAYS)
        theirs = safetensors.numpy.load_file(tmp_path / "ours")
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(theirs[name], array)

    def test_a_dtype_without_a_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"x: w has dtype complex128, expected one of float64, float32"):
            write_arrays(Storage(tmp_path), "x", {"w": np.zeros(2, complex)})
        assert Storage(tmp_path).list() == {}


def test_a_record_batch_comes_back_as_it_was(place: Storage) -> None:
    batch = pa.record_batch({"id": ["a", "b", "c"], "tokens": [[1, 2], [], [3]]})
    for each in (batch, batch.slice(1), batch.slice(3)):
        assert read_batch(place, write_batch(place, "x", each), "").equals(each)


def test_files_of_an_export_are_written_below_their_directory(tmp_path: Path) -> None:
    files = {"config.json": np.frombuffer(b"{}", np.uint8), "deep/model": np.arange(9, dtype=np.uint8)}
    assert [fact.num_bytes for fact in write_files(str(tmp_path / "student"), files)] == [2, 9]
    assert (tmp_path / "student" / "deep" / "model").read_bytes() == bytes(range(9))
