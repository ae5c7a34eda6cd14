"""Two drivers and one directory of checkpoints: one of them writes, whatever happens to the other."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

import fake_ray
from driven_run import assert_whole, cast_of, drive, events, in_no_hurry, latest
from fake_shelves import Objects, contents, held, make_snapshot
from opd_ray.config import from_dict
from opd_ray.errors import InputError, StorageUnavailable, Superseded
from opd_ray.run import train
from opd_ray.snapshots import Checkpoint, Lease, Shelf, Storage, lease, storage


@pytest.fixture(params=["directory", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path / "shelf" if request.param == "directory" else f"memory://{uuid.uuid4().hex}/shelf")


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # nothing here cuts the power


class Driver:
    """One that wants to write; ``meanwhile`` is what others do each time that it waits."""

    def __init__(
        self, place: Storage, objects: Objects, run: str = "/runs/a", meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        self.waited_s = 0.0
        self.meanwhile = meanwhile
        self.lease = Lease(place, run, clock=lambda: self.waited_s, pause=self._pause)
        self.shelf = Shelf(place, objects, self.lease)

    def start(self, *, resume: bool = False) -> Checkpoint | None:
        self.shelf.check(resume=resume)
        self.lease.take()
        return self.shelf.check(resume=resume)

    def _pause(self, seconds: float) -> None:
        self.waited_s += seconds
        self.meanwhile()


def there(place: Storage) -> dict:
    return json.loads(place.read_if_there(lease.FILE))


def rewrite(place: Storage, **changes: object) -> None:
    place.write(lease.FILE, [json.dumps(there(place) | changes).encode()])


def files(place: Storage) -> dict[str, bytes]:
    return {name: bytes(place.read(name)) for name, size in place.list().items() if size is not None}


def refused(driver: Driver, *, resume: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        driver.start(resume=resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_writer_is_refused_while_the_first_lives(place: Storage, objects: Objects) -> None:
    """The bug: it was let in, and deleted as left over what the first was writing."""
    first = Driver(place, objects)
    first.start()
    place.write("step-2/learner-0-of-1.9f3c21d0.safetensors", [b"half of what the first is writing"])
    before = files(place)
    second = Driver(place, objects, meanwhile=first.lease.beat)
    assert f"{place.url()} is being written by process {os.getpid()} on " in refused(second)
    assert second.waited_s < lease.STALE_S
    assert files(place) == before | {lease.FILE: bytes(place.read(lease.FILE))}
    asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    assert asyncio.run(first.shelf.latest()).step == 2


def test_a_stale_lease_is_taken_over_and_the_first_writes_and_deletes_nothing_more(
    place: Storage, objects: Objects
) -> None:
    first, second = Driver(place, objects), Driver(place, objects)
    first.start()
    asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    place.write("step-4/learner-0-of-1.9f3c21d0.safetensors", [b"what the first had under way"])
    assert second.start(resume=True).step == 2
    assert lease.STALE_S <= second.waited_s < lease.STALE_S + 10
    place.write("step-6/learner-0-of-1.9f3c21d1.safetensors", [b"half of what the second is writing"])
    before = files(place)
    found = asyncio.run(first.shelf.latest())
    for change in (
        lambda: asyncio.run(first.shelf.write(make_snapshot(objects, 8), 1)),
        lambda: asyncio.run(first.shelf.amend(found, {"guard": "stronger"})),
        lambda: asyncio.run(first.shelf.discard_after(1)),
        first.lease.beat,
    ):
        with pytest.raises(Superseded, match=r"was taken over by process \d+ on \S+ of /runs/a, because this driver"):
            change()
        assert files(place) == before
    first.lease.release()
    assert files(place) == before, "it releases nothing that is another's"
    snapshot = make_snapshot(objects, 4)
    asyncio.run(second.shelf.write(snapshot, 1))
    assert {name.partition("/")[0] for name in place.list()} == {"step-4", lease.FILE}, "its own run's are cleaned up"
    assert held(second.shelf, objects, asyncio.run(second.shelf.latest())) == contents(objects, snapshot)


def test_one_that_is_superseded_while_it_writes_leaves_no_checkpoint(place: Storage, objects: Objects) -> None:
    first, second = Driver(place, objects), Driver(place, objects)
    first.start()
    written = objects.__call__

    async def slowly(function, *args):
        if second.waited_s == 0:
            second.start(resume=True)
            place.write("step-2/learner-0-of-1.9f3c21d1.safetensors", [b"half of what the second is writing"])
        return await written(function, *args)

    first.shelf._call = slowly
    with pytest.raises(Superseded):
        asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    assert "step-2/state.json" not in files(place)
    assert "step-2/learner-0-of-1.9f3c21d1.safetensors" in files(place)


def test_after_a_clean_end_nobody_waits(place: Storage, objects: Objects) -> None:
    first, second = Driver(place, objects), Driver(place, objects)
    first.start()
    first.lease.release()
    first.lease.beat()  # one that was under way
    assert there(place)["released"]
    second.start(resume=True)
    assert second.waited_s <= 2.0
    assert there(place)["owner"] == second.lease._mine["owner"]


def test_one_that_is_released_while_it_is_watched_is_taken(place: Storage, objects: Objects) -> None:
    first = Driver(place, objects)
    first.start()
    second = Driver(place, objects, meanwhile=first.lease.release)
    second.start(resume=True)
    assert second.waited_s < 10


def test_a_dead_process_of_this_machine_is_taken_over_at_once_and_a_living_one_is_not_watched(
    place: Storage, objects: Objects
) -> None:
    first = Driver(place, objects)
    first.start()
    ended = subprocess.Popen(["true"])
    ended.wait()
    rewrite(place, pid=os.getppid())
    second = Driver(place, objects)
    assert f"is being written by process {os.getppid()} on" in refused(second)
    assert second.waited_s == 0
    rewrite(place, pid=os.getppid(), time=1.0)  # the number is another process's now
    second.start(resume=True)
    rewrite(place, pid=ended.pid)
    third = Driver(place, objects)
    third.start(resume=True)
    assert max(second.waited_s, third.waited_s) <= 2.0


def test_a_process_of_another_container_or_host_is_watched(place: Storage, objects: Objects) -> None:
    """Its number says nothing here."""
    Driver(place, objects).start()
    rewrite(place, machine="another", pid=os.getppid())
    second = Driver(place, objects)
    second.start(resume=True)
    assert second.waited_s >= lease.STALE_S


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_of_another_run_is_refused_and_stays_as_it_is(
    place: Storage, objects: Objects, resume: bool
) -> None:
    """The bug: what another run had under way was deleted as left over."""
    first = Driver(place, objects)
    first.start()
    place.write("step-2/learner-0-of-1.9f3c21d0.safetensors", [b"half"])
    for end in (lambda: None, first.lease.release):
        end()
        before = files(place)
        other = Driver(place, objects, run="/runs/b")
        message = refused(other, resume=resume)
        assert f"checkpoints: {place.url()} is of another run, /runs/a (process {os.getpid()} on " in message
        assert "this one is /runs/b; give another checkpoint.directory ({run} in it" in message
        assert (other.waited_s, files(place)) == (0, before)


def test_a_directory_that_another_run_has_left_empty_is_taken(place: Storage, objects: Objects) -> None:
    first = Driver(place, objects)
    first.start()
    assert "is of another run, /runs/a" in refused(Driver(place, objects, run="/runs/b"), resume=False)
    first.lease.release()
    Driver(place, objects, run="/runs/b").start()
    assert there(place)["run"] == "/runs/b"


def test_of_two_that_take_it_at_once_one_gets_it(place: Storage, objects: Objects) -> None:
    second = Driver(place, objects)
    first = Driver(place, objects, meanwhile=lambda: second.lease._write(released=False))
    assert "was taken at the same moment by process" in refused(first, resume=False)
    assert there(place)["owner"] == second.lease._mine["owner"]


def test_a_refusal_leaves_no_trace(place: Storage, objects: Objects) -> None:
    first = Driver(place, objects)
    first.start()
    asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    first.lease.release()
    before = files(place)
    assert "holds checkpoints of another run, up to step 2" in refused(Driver(place, objects), resume=False)
    assert files(place) == before
    place.write("step-2/state.json", [b"{"])
    before = files(place)
    assert "is damaged" in refused(Driver(place, objects))
    assert files(place) == before


def test_a_lease_that_is_half_written_is_nobodys_only_when_it_stays_so(place: Storage, objects: Objects) -> None:
    first = Driver(place, objects)
    first.start()
    place.write(lease.FILE, [b'{"format": "opd'])
    with pytest.raises(StorageUnavailable, match="half written"):
        asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    second = Driver(place, objects)
    second.start(resume=True)
    assert second.waited_s >= lease.STALE_S


def test_a_file_of_that_name_that_is_not_ours_is_refused(place: Storage, objects: Objects) -> None:
    place.write(lease.FILE, [b"[]"])
    assert "lease.json is not one of opd_ray" in refused(Driver(place, objects))


def test_a_lease_that_somebody_has_deleted_is_written_anew(place: Storage, objects: Objects) -> None:
    first = Driver(place, objects)
    first.start()
    place.delete(lease.FILE)
    asyncio.run(first.shelf.write(make_snapshot(objects, 2), 1))
    first.lease.beat()
    assert there(place)["owner"] == first.lease._mine["owner"]


# ---- the beat ----


def test_the_beat_goes_on_over_a_storage_that_is_away_and_ends_when_another_has_the_lease(
    place: Storage, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Driver(place, objects)
    first.start()

    async def scenario() -> None:
        keeping = asyncio.create_task(first.lease.keep())
        await asyncio.sleep(25)
        assert there(place)["beat"] == 2
        with monkeypatch.context() as away:
            away.setattr(Storage, "read_if_there", mock.Mock(side_effect=StorageUnavailable("SLOW_DOWN")))
            await asyncio.sleep(3600)
        assert there(place)["beat"] == 2
        await asyncio.sleep(10)
        assert there(place)["beat"] == 3
        rewrite(place, owner="another")
        await asyncio.sleep(10)
        with pytest.raises(Superseded):
            await keeping
        assert there(place)["owner"] == "another"

    fake_ray.run(scenario())


def test_a_storage_that_hangs_stops_neither_the_loop_nor_the_end(
    tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Driver(Storage(tmp_path), objects)
    first.start()
    hangs, gate = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        gate.wait()

    monkeypatch.setattr(lease, "BEAT_S", 0.0)
    monkeypatch.setattr(lease, "_RELEASE_S", 0.0)
    monkeypatch.setattr(Storage, "read_if_there", hang)

    async def scenario() -> None:
        keeping = asyncio.create_task(first.lease.keep())
        while not hangs.is_set():
            await asyncio.sleep(0)
        keeping.cancel()

    asyncio.run(scenario())
    first.lease.release()
    assert not gate.is_set(), "neither waited for the storage"
    assert json.loads((tmp_path / "lease.json").read_text())["released"] is False, "nothing claims what was not written"
    gate.set()


# ---- whole runs ----


def test_a_run_that_is_superseded_ends_and_leaves_all_to_the_other(tmp_path: Path) -> None:
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 2, "keep": 1})
    place = Storage(tmp_path / "checkpoints")

    async def meanwhile(_: asyncio.Event) -> None:
        await fake_ray.until(lambda: (tmp_path / "checkpoints/step-2/state.json").exists(), most=100_000)
        rewrite(place, owner="another")
        place.write("step-4/learner-0-of-1.9f3c21d1.safetensors", [b"half of what the other is writing"])

    with pytest.raises(Superseded, match="was taken over by process"):
        drive(tmp_path, cast, meanwhile=meanwhile)
    assert there(place)["owner"] == "another" and not there(place)["released"]
    assert latest(tmp_path).step == 2
    assert "step-4/learner-0-of-1.9f3c21d1.safetensors" in place.list()


def test_a_run_whose_storage_is_away_for_a_while_goes_on_and_releases_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = cast_of(in_no_hurry, checkpoint={"every_steps": 2})
    fine, fails = Storage.read_if_there, iter(range(12))

    def away(self: Storage, name: str) -> bytes | None:
        if (tmp_path / "checkpoints/step-2").exists() and next(fails, None) is not None:
            raise StorageUnavailable("SLOW_DOWN")
        return fine(self, name)

    monkeypatch.setattr(Storage, "read_if_there", away)
    drive(tmp_path, cast)
    assert_whole(cast, tmp_path)
    assert events(tmp_path, "checkpoint_failed")
    assert next(fails, None) is None
    assert there(Storage(tmp_path / "checkpoints"))["released"]


def test_a_run_directory_may_move_with_its_checkpoints_but_not_take_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "Lease", functools.partial(Lease, pause=lambda _: None))

    def start(run_dir: str, directory: str | None = None) -> None:
        config = from_dict({"checkpoint": {"directory": directory}})
        train.find_start(config, tmp_path / run_dir, resume=True)[0].lease.release()

    half = "step-2/learner-0-of-1.9f3c21d0.safetensors"
    start("a")
    Storage(tmp_path / "a" / "checkpoints").write(half, [b"half"])
    (tmp_path / "a").rename(tmp_path / "b")
    start("b")
    place = Storage(tmp_path / "b" / "checkpoints")
    assert half not in place.list(), "what a killed driver had begun"
    place.write(half, [b"half"])
    with pytest.raises(InputError, match="is of another run, that of the directory around it"):
        start("c", str(tmp_path / "b" / "checkpoints"))
    start("c", str(tmp_path / "shared" / "{run}"))
    assert there(Storage(tmp_path / "shared" / "c"))["released"]
    start("d", str(tmp_path / "shared" / "{run}"))
    assert there(Storage(tmp_path / "shared" / "c"))["run"] == str(tmp_path / "c")
    (tmp_path / "shared" / "c" / "step-2").mkdir()
    with pytest.raises(InputError, match=rf"is of another run, {tmp_path}/c \(process"):
        start("d", str(tmp_path / "shared" / "c"))


def test_what_was_written_while_the_lease_was_watched_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Storage(tmp_path / "checkpoints")
    spoil = functools.partial(place.write, "step-9/state.json", [b"{}"])
    monkeypatch.setattr(train, "Lease", functools.partial(Lease, pause=lambda _: spoil()))
    with pytest.raises(InputError, match="step-9/state.json is not a checkpoint's"):
        train.find_start(from_dict({}), tmp_path, resume=True)
    assert there(place)["released"]
