"""Checkpoints on a shelf: what goes in comes out, which are kept, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import re
import uuid
from pathlib import Path

import pytest

from fake_shelves import Objects, contents, held, make_snapshot
from opd_ray.errors import InputError, RunError
from opd_ray.snapshots import Shelf, Snapshot, Storage, storage


@pytest.fixture(params=["directory", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shelf") if request.param == "directory" else f"memory://{uuid.uuid4().hex}/shelf"


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def shelf(tmp_path: Path, objects: Objects) -> Shelf:
    return Shelf(str(tmp_path), objects)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # nothing here cuts the power


def write(shelf: Shelf, objects: Objects, *steps: int, keep: int = 9, **options) -> None:
    for step in steps:
        asyncio.run(shelf.write(make_snapshot(objects, step, **options), keep))


def steps_at(place: Storage) -> list[int]:
    return sorted(int(name[5:-11]) for name in place.list() if name.endswith("/state.json"))


# ---- what goes in comes out ----


def test_a_snapshot_comes_back_as_it_was(location: str, objects: Objects) -> None:
    snapshot = make_snapshot(objects, 3)
    written = asyncio.run(Shelf(location, objects).write(snapshot, 2))
    shelf = Shelf(location, objects)
    found = shelf.check(resume=True)
    assert repr(found) == repr(asyncio.run(shelf.latest())) == repr(written)
    assert (found.step, found.state, found.where) == (3, snapshot.state, f"{location}/step-3")
    assert held(shelf, objects, found) == contents(objects, snapshot)


def test_one_with_an_empty_buffer_and_no_followers_comes_back(shelf: Shelf, objects: Objects) -> None:
    snapshot = Snapshot(0, {}, (objects.put({}),), state={"healthy": False})
    assert held(shelf, objects, asyncio.run(shelf.write(snapshot, 1))) == contents(objects, snapshot)


def test_a_payload_of_several_rollouts_is_written_and_read_once(shelf: Shelf, objects: Objects) -> None:
    write(shelf, objects, 1)
    assert [name for name, _ in objects.calls] == ["write_arrays"] * 3 + ["write_batch"] * 4
    objects.calls.clear()
    back = asyncio.run(shelf.read(asyncio.run(shelf.latest())))
    assert sorted(name for name, _ in objects.calls) == ["read_arrays"] * 3 + ["read_batch"] * 4
    first, second, _ = back.entries
    assert first.rollouts == second.rollouts
    assert first.scores == second.scores


def test_a_snapshot_is_that_of_the_call(shelf: Shelf, objects: Objects) -> None:
    snapshot = make_snapshot(objects, 1)

    async def change_it_meanwhile():
        writing = asyncio.ensure_future(shelf.write(snapshot, 1))
        await asyncio.sleep(0)
        snapshot.state["events"].append("later")
        return await writing

    assert asyncio.run(change_it_meanwhile()).state["events"] == [{"value": float("inf")}]


def test_names_that_are_no_file_names(shelf: Shelf, objects: Objects) -> None:
    snapshot = make_snapshot(objects, 1)
    facts, ref = snapshot.followers["reference"]
    followers = {role: (facts, objects.put(objects.get(ref))) for role in ("../math", "a b", "ä")}
    snapshot = dataclasses.replace(snapshot, followers=followers)
    assert held(shelf, objects, asyncio.run(shelf.write(snapshot, 1))) == contents(objects, snapshot)


# ---- which are kept ----


def test_two_at_once_wait_for_each_other(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    async def both():
        await asyncio.gather(*(shelf.write(make_snapshot(objects, step), 2) for step in (1, 2)))

    asyncio.run(both())
    assert steps_at(Storage(tmp_path)) == [1, 2]
    assert held(shelf, objects, asyncio.run(shelf.latest())) == contents(objects, make_snapshot(objects, 2))


def test_the_newest_are_kept(location: str, objects: Objects) -> None:
    write(Shelf(location, objects), objects, 2, 4, 10, 6, keep=2)
    assert steps_at(Storage(location)) == [6, 10]
    assert {name.split("/")[0] for name in Storage(location).list()} == {"step-6", "step-10"}


def test_the_newest_healthy_one_is_kept_beyond_the_number(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    write(shelf, objects, 1, 2, keep=1)
    write(shelf, objects, 3, 4, 5, keep=2, healthy=False)
    assert steps_at(Storage(tmp_path)) == [2, 4, 5]
    assert (asyncio.run(shelf.latest()).step, asyncio.run(shelf.latest(healthy=True)).step) == (5, 2)
    write(shelf, objects, 6, keep=2)
    assert steps_at(Storage(tmp_path)) == [5, 6]


def test_what_a_driver_was_killed_before_it_deleted_goes_when_the_next_one_begins(
    shelf: Shelf, tmp_path: Path, objects: Objects
) -> None:
    """The bug: a run that was killed between its last checkpoint and the deletion of the oldest kept one too many."""
    write(shelf, objects, 1, 2, 3)
    shelf.tidy(keep=2)
    assert steps_at(Storage(tmp_path)) == [2, 3]


def test_without_a_healthy_one_there_is_none_to_go_back_to(shelf: Shelf, objects: Objects) -> None:
    assert asyncio.run(shelf.latest()) is None
    write(shelf, objects, 1, healthy=False)
    assert asyncio.run(shelf.latest(healthy=True)) is None


def test_a_run_that_goes_back_discards_what_came_after_and_says_so(location: str, objects: Objects) -> None:
    shelf = Shelf(location, objects)
    write(shelf, objects, 2, 4, 6)
    before = held(shelf, objects, asyncio.run(shelf.latest()))
    asyncio.run(shelf.discard_after(6))
    assert held(shelf, objects, asyncio.run(shelf.latest())) == before
    asyncio.run(shelf.discard_after(2))
    assert {name.split("/")[0] for name in Storage(location).list()} == {"step-2"}
    expected = asyncio.run(shelf.latest()).state | {"guard": "stronger"}
    amended = asyncio.run(shelf.amend(asyncio.run(shelf.latest()), {"guard": "stronger"}))
    assert amended.state == asyncio.run(shelf.latest()).state == expected
    assert asyncio.run(shelf.read(amended)).state == expected


def test_what_others_have_there_is_left_alone(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    theirs = [
        "model.pt",
        "step-1/optimizer.pt",
        "step-7/weights.safetensors",
        "step-8/state.json",
        "steps/x",
        "step-a/x",
    ]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    write(shelf, objects, 1, 2, 3, keep=1)
    asyncio.run(shelf.discard_after(2))
    ours = {name for name, size in Storage(tmp_path).list().items() if size is not None}
    assert ours == set(theirs)


# ---- what goes wrong ----


def test_a_full_disk_leaves_the_previous_one_and_gives_its_space_back(
    shelf: Shelf, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(shelf, objects, 1)
    before = Storage(tmp_path).list()
    left = 3

    def full(_):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "fsync", full)
        with pytest.raises(RunError, match=r"step-2/\S+ cannot be written: no space is left .*; free some there"):
            write(shelf, objects, 2)
    assert Storage(tmp_path).list() == before
    write(shelf, objects, 2)


def test_a_failing_task_is_the_failure_of_the_write(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    bad = dataclasses.replace(make_snapshot(objects, 2), learner_parts=(objects.put({"w": b"no array"}),))
    with pytest.raises(AttributeError):
        asyncio.run(shelf.write(bad, 1))
    assert Storage(tmp_path).list() == {}


def files_of(shelf: Shelf, kind: str) -> list[Path]:
    return [Path(shelf._storage.location, name) for name in asyncio.run(shelf.latest()).files if name.endswith(kind)]


@pytest.mark.parametrize("kind", ["safetensors", "arrow"])
def test_a_flipped_bit_anywhere_is_found_when_it_is_read(shelf: Shelf, objects: Objects, kind: str) -> None:
    write(shelf, objects, 2, 4)
    for path in files_of(shelf, kind):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(RunError, match=rf"{path} is damaged: .*; delete \S+/step-4 to resume from step 2$"):
                asyncio.run(shelf.read(shelf.check(resume=True)))
        path.write_bytes(content)
    asyncio.run(shelf.read(shelf.check(resume=True)))


def test_a_file_that_is_cut_off_or_gone_is_refused_before_anything_is_loaded(shelf: Shelf, objects: Objects) -> None:
    write(shelf, objects, 4)
    for path in files_of(shelf, ""):
        content, expected = path.read_bytes(), f"expected {path.stat().st_size} bytes; delete "
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=rf"{path} has {len(content) - 1} bytes, {expected}"):
            shelf.check(resume=True)
        path.unlink()
        with pytest.raises(InputError, match=rf"{path} is not there, {expected}\S+ to begin anew: there is no older"):
            shelf.check(resume=True)
        path.write_bytes(content)
    shelf.check(resume=True)


@pytest.mark.slow
def test_a_damaged_state_is_refused_wherever_it_is(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    write(shelf, objects, 2, 4)
    path = tmp_path / "step-4" / "state.json"
    content = path.read_bytes()
    for place in range(0, len(content) - 1, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=rf"^checkpoints: {path} (is|has) "):
            shelf.check(resume=True)
        path.write_bytes(content[:place])
        with pytest.raises(
            InputError, match=rf"{path} is damaged or cut off \({place} bytes, no JSON\); delete .*step 2"
        ):
            shelf.check(resume=True)
        with pytest.raises(RunError, match="is damaged or cut off"):
            asyncio.run(shelf.latest())


@pytest.mark.parametrize("foreign", ["[]", "3", "{}", '{"format": "another"}', '{"step": 4, "num_ranks": 2}'])
def test_a_foreign_state_is_refused(shelf: Shelf, tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "step-4" / "state.json"
    path.parent.mkdir()
    path.write_text(foreign)
    with pytest.raises(InputError, match=rf"{path} is not a checkpoint's: expected .*; give a directory of its own"):
        shelf.check(resume=True)


def test_another_format_is_refused(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    write(shelf, objects, 2, 4)
    path = tmp_path / "step-4" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(InputError, match=r"has format version 2, expected 1; resume with the release .* from step 2"):
        shelf.check(resume=True)


def test_a_directory_under_another_name_is_refused(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    write(shelf, objects, 4)
    (tmp_path / "step-4").rename(tmp_path / "step-9")
    with pytest.raises(InputError, match="step-9/state.json is of step 4; rename its directory to step-4"):
        shelf.check(resume=True)


def test_a_damaged_one_is_no_obstacle_to_writing(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    write(shelf, objects, 2)
    (tmp_path / "step-2" / "state.json").write_text("")
    write(shelf, objects, 4, 6, keep=1)
    assert steps_at(Storage(tmp_path)) == [2, 6]
    assert asyncio.run(shelf.latest()).step == 6


def test_a_new_run_does_not_go_on_the_shelf_of_another(shelf: Shelf, objects: Objects, tmp_path: Path) -> None:
    assert shelf.check(resume=False) is None
    assert shelf.check(resume=True) is None
    write(shelf, objects, 4)
    message = f"checkpoints: {tmp_path} holds checkpoints of another run, up to step 4; add --resume"
    with pytest.raises(InputError, match=re.escape(message)):
        shelf.check(resume=False)


def test_where_nothing_can_be_written_is_refused(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"checkpoints: \S+ cannot be written: a file is where a directory is needed"):
        Shelf(str(tmp_path / "file"), objects).check(resume=False)
    with pytest.raises(InputError, match=r"checkpoints: cloud://bucket\S* cannot be written: .*cloud"):
        Shelf("cloud://bucket", objects).check(resume=True)
