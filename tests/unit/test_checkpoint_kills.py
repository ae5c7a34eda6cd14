"""A checkpoint is whole or not there, at whatever moment its writer dies."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_shelves import Objects, contents, held, make_snapshot
from opd_ray.snapshots import Shelf, Snapshot, Storage, storage


@pytest.fixture(params=["directory", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shelf") if request.param == "directory" else f"memory://{uuid.uuid4().hex}/shelf"


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # nothing here cuts the power


class Killed(BaseException):
    """The process is gone: no handler of errors runs either."""


class Mortal(Storage):
    """Dies before or halfway through one of its operations; then nothing happens any more."""

    def __init__(self, location: str, moment: int) -> None:
        super().__init__(location)
        self._left = moment

    def _live(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Killed

    def list(self):
        self._live()
        return super().list()

    def read(self, name):
        self._live()
        return super().read(name)

    def write(self, name, chunks):
        self._live()
        content = b"".join(bytes(chunk) for chunk in chunks)
        try:
            self._live()
        except Killed:
            # Locally under another name; far away a small file is whole or not there, but of a large one may be a part.
            folder, _, file = name.rpartition("/")
            partial = f"{folder}/.{file}.partial" if self.is_local else name
            if self.is_local or file != "state.json":
                super().write(partial, [content[: len(content) // 2]])
            raise
        return super().write(name, [content])

    def delete(self, name):
        self._live()
        super().delete(name)

    def delete_directory(self, name):
        self._live()
        files = sorted(file for file in super().list() if file.startswith(f"{name}/"))
        for file in files[::2]:
            super().delete(file)
        self._live()
        super().delete_directory(name)


def kill_everywhere(
    location: str, objects: Objects, before: list[Snapshot], keep: int, act: Callable[[Shelf], None]
) -> Iterator[Shelf]:
    """Lets ``act`` be killed at every moment, each time at a place of its own that holds ``before``; yields the shelf
    that comes after it."""
    for moment in range(1000):
        place = f"{location}-{moment}"
        shelf = Shelf(place, objects)
        for snapshot in before:
            asyncio.run(shelf.write(snapshot, keep))
        try:
            act(Shelf(Mortal(place, moment), objects))
        except Killed:
            yield Shelf(place, objects)
        else:
            yield Shelf(place, objects)
            assert moment > 5
            return


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_previous_or_the_new_one(location: str, objects: Objects) -> None:
    first, second, third = (make_snapshot(objects, step) for step in (2, 4, 6))
    expected = {snapshot.step: contents(objects, snapshot) for snapshot in (first, second, third)}
    seen = set()

    def act(shelf):
        asyncio.run(shelf.write(third, 2))

    for shelf in kill_everywhere(location, objects, [first, second], 2, act):
        found = shelf.check(resume=True)
        seen.add(found.step)
        assert held(shelf, objects, found) == expected[found.step]
        # The next start goes on, and sweeps what was left.
        asyncio.run(shelf.write(third, 2))
        named = {name for each in (4, 6) for name in shelf._open(each).files} | {"step-4", "step-6"}
        assert shelf._storage.list().keys() == named | {"step-4/state.json", "step-6/state.json"}
    assert seen == {4, 6}


@pytest.mark.slow
def test_a_kill_while_writing_a_step_anew_leaves_one_of_the_two(location: str, objects: Objects) -> None:
    old, new = (make_snapshot(objects, 4, seed=seed) for seed in (0, 1))
    expected = [contents(objects, old), contents(objects, new)]
    seen = set()

    def act(shelf):
        asyncio.run(shelf.write(new, 1))

    for shelf in kill_everywhere(location, objects, [old], 1, act):
        found = held(shelf, objects, shelf.check(resume=True))
        assert found in expected
        seen.add(expected.index(found))
    assert seen == {0, 1}


@pytest.mark.slow
def test_a_kill_while_going_back_leaves_one_that_loads(location: str, objects: Objects) -> None:
    snapshots = [make_snapshot(objects, step) for step in (2, 4, 6)]
    seen = set()

    def act(shelf):
        asyncio.run(shelf.discard_after(2))
        asyncio.run(shelf.amend(asyncio.run(shelf.latest()), {"guard": "stronger"}))

    for shelf in kill_everywhere(location, objects, snapshots, 3, act):
        found = shelf.check(resume=True)
        asyncio.run(shelf.read(found))
        seen.add((found.step, found.state["guard"] == "stronger"))
    assert seen == {(2, False), (2, True), (4, False), (6, False)}


def test_one_that_still_writes_after_its_run_was_resumed_damages_nothing(objects: Objects, tmp_path: Path) -> None:
    """Tasks of a driver that was killed may be at work for a moment longer."""
    late = []

    class Late(Objects):
        async def __call__(self, function, *args):
            late.append((function, args))
            raise Killed

    old, new = (make_snapshot(objects, 4, seed=seed) for seed in (0, 1))
    with pytest.raises(Killed):
        asyncio.run(Shelf(str(tmp_path), Late()).write(old, 1))
    shelf = Shelf(str(tmp_path), objects)
    asyncio.run(shelf.write(new, 1))
    for function, args in late:
        asyncio.run(objects(function, *args))
    assert held(shelf, objects, shelf.check(resume=True)) == contents(objects, new)
    asyncio.run(shelf.write(make_snapshot(objects, 6), 2))
    assert len(list((tmp_path / "step-4").iterdir())) == 1 + len(shelf._open(4).files)
