"""Where a run's snapshots are kept: one directory per step, complete or absent.

    step-50/state.json                          the snapshot without its arrays; the checkpoint is there when this is
    step-50/learner-0-of-2.9f3c21d0.safetensors     one per rank that saved
    step-50/follower-reference.9f3c21d0.safetensors
    step-50/payload-0.9f3c21d0.arrow            rollouts and scores in the buffer

state.json is written last and deleted first, so a kill at any moment leaves the other checkpoints usable. The digits
are of one attempt to write: what an earlier one left, or still writes, is never mistaken for a part of another.
lease.json (:mod:`opd_ray.snapshots.lease`) says whose the directory is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import secrets
import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from opd_ray.errors import OpdError, RunError, StorageUnavailable, refusing
from opd_ray.rooms.threads import in_thread
from opd_ray.snapshots.files import read_arrays, read_batch, write_arrays, write_batch
from opd_ray.snapshots.lease import Lease
from opd_ray.snapshots.snapshot import Snapshot
from opd_ray.snapshots.storage import FileFact, Storage

if TYPE_CHECKING:
    from opd_ray.snapshots.calls import FileCalls

_FORMAT, _VERSION = "opd_ray checkpoint", 1
_STATE = "state.json"
_CALL_S = 120.0
"""How long the small calls to the storage may take: listing, deleting, state.json."""
_STEP = re.compile(r"step-(\d+)(?:/(.+))?")
_OURS = re.compile(r"\.?(state\.json|(learner|follower|payload)-.+\.[0-9a-f]{8}\.(safetensors|arrow))(\.partial)?")
"""Names of files that may be deleted; whatever else lies in a step's directory is somebody's."""
_WRITE = {"safetensors": write_arrays, "arrow": write_batch}
_READ = {"safetensors": read_arrays, "arrow": read_batch}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    snapshot: Snapshot
    """With names of files in the place of refs."""
    files: Mapping[str, FileFact]
    """By name."""
    where: str
    """Its directory, for messages."""

    @property
    def step(self) -> int:
        """Optimizer steps it has behind it."""
        return self.snapshot.step

    @property
    def state(self) -> dict[str, Any]:
        return self.snapshot.state


class Shelf:
    """The checkpoints of one run."""

    def __init__(self, location: str | Storage, call: FileCalls, lease: Lease | None = None) -> None:
        """``location`` is a directory or a URI; nothing is opened yet. Nobody else writes here while the ``lease`` is
        held."""
        self._storage = location if isinstance(location, Storage) else Storage(location)
        self._call, self.lease = call, lease or Lease(self._storage, "")
        self._lock = asyncio.Lock()
        self._hanging: asyncio.Future[Any] | None = None
        """A call that had no end by its deadline; what it still does must not meet another one."""

    @property
    def storage(self) -> Storage:
        """Where it is; others may have files of their own in it."""
        return self._storage

    def check(self, *, resume: bool) -> Checkpoint | None:
        """The checkpoint to resume from, if there is one.

        Raises InputError, before anything is loaded, when files cannot be written, read and deleted here; when another
        run has its checkpoints here; when the newest checkpoint is damaged, incomplete, of another format or not one of
        opd_ray; and, unless ``resume``, when there are checkpoints.
        """
        with refusing("checkpoints"):
            self._storage.probe()
            found = self._steps()
            self.lease.check_run(empty=not found)
            if (steps := _complete(found)) and not resume:
                raise RunError(
                    f"{self._storage.url()} holds checkpoints of another run, up to step {steps[-1]}; add --resume to "
                    "go on with it, or give another checkpoint.directory"
                )
            return self._intact(steps[-1]) if steps else None

    def complete(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return _complete(self._steps())

    def at(self, step: int | None) -> Checkpoint:
        """The checkpoint of a step, or the newest; RunError where there is none or it is not whole."""
        there = self.complete()
        if not there or step not in (None, *there):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise RunError(
                f"{self._storage.url()} holds {wanted}; complete ones: {', '.join(map(str, there)) or 'none'}"
            )
        return self._intact(there[-1] if step is None else step)

    async def latest(self, *, healthy: bool = False) -> Checkpoint | None:
        """The newest checkpoint, if there is one; with ``healthy``, the newest without an alarm."""
        return await self._do(self._latest, healthy)

    async def write(self, snapshot: Snapshot, keep: int) -> Checkpoint:
        """Writes a checkpoint, and deletes the oldest beyond ``keep``, but never the newest healthy one.

        ``snapshot`` is taken as it is at the call. One that fails or is killed leaves the others as they were.
        """
        names = _names(snapshot, secrets.token_hex(4))
        described = _plain(snapshot.with_parts(names))
        async with self._lock:
            await self._do(self.tidy)
            try:
                calls = [self._call(_WRITE[_kind(name)], self._storage, name, ref) for ref, name in names.items()]
                checkpoint = await self._do(self._seal, described, await _all(calls))
                await self._do(self.tidy, keep)
            except Exception:
                with contextlib.suppress(OpdError):  # what was written takes space that the next one needs
                    await self._do(self.tidy)
                raise
        return checkpoint

    async def read(self, checkpoint: Checkpoint) -> Snapshot:
        """The snapshot, with every file read once into the object store. Raises RunError for a damaged file."""
        otherwise = await self._do(self._otherwise, checkpoint.step)
        calls = [
            self._call.payload(_READ[_kind(name)], self._storage, fact, otherwise)
            for name, fact in checkpoint.files.items()
        ]
        return checkpoint.snapshot.with_parts(dict(zip(checkpoint.files, await _all(calls), strict=True)))

    async def amend(self, checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Checkpoint:
        """Writes other values into a checkpoint's state, all or none."""
        snapshot = dataclasses.replace(checkpoint.snapshot, state=checkpoint.state | dict(changes))
        return await self._do(self._seal, _plain(snapshot), list(checkpoint.files.values()))

    async def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the latest first: a run that goes back makes them anew."""
        await self._do(self._discard_after, step)

    async def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        """The outcome of a function that uses the storage. Raises StorageUnavailable when there is none in time."""
        if self._hanging is None or self._hanging.done():
            call = in_thread(function, *args)
            await asyncio.wait([call], timeout=_CALL_S)
            if call.done():
                return call.result()
            self._hanging = call
        raise StorageUnavailable(
            f"{self._storage.url()} gives no answer for more than {_CALL_S:g} s; see that what serves it is up"
        )

    # ---- what lies there ----

    def _latest(self, healthy: bool) -> Checkpoint | None:
        for step in reversed(_complete(self._steps())):
            checkpoint = self._open(step)
            if not healthy or checkpoint.state["healthy"]:
                return checkpoint
        return None

    def _steps(self) -> dict[int, list[str]]:
        """Step to the names in its directory."""
        steps: dict[int, list[str]] = {}
        for name in self._storage.list():
            if found := _STEP.fullmatch(name):
                steps.setdefault(int(found[1]), []).extend(filter(None, [found[2]]))
        return steps

    def _usable(self, steps: Mapping[int, Sequence[str]]) -> dict[int, Checkpoint]:
        """The complete ones that can be read; what cannot is left alone, for it may be somebody's."""
        usable = {}
        for step in _complete(steps):
            with contextlib.suppress(RunError):
                usable[step] = self._open(step)
        return usable

    def _open(self, step: int) -> Checkpoint:
        """Reads state.json; RunError when it is not one that ``_seal`` wrote."""
        name = f"step-{step}/{_STATE}"
        content = bytes(self._storage.read(name))
        file = self._storage.url(name)
        try:
            document = json.loads(content)
        except ValueError:
            raise RunError(
                f"{file} is damaged or cut off ({len(content)} bytes, no JSON); {self._otherwise(step)}"
            ) from None
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise RunError(
                f'{file} is not a checkpoint\'s: expected "format": "{_FORMAT}"; give a directory of its own with '
                "checkpoint.directory, or move it away"
            )
        if document.get("version") != _VERSION:
            raise RunError(
                f"{file} has format version {document.get('version')}, expected {_VERSION}; resume with the release of "
                f"opd_ray that wrote it, or {self._otherwise(step)}"
            )
        found, written = zlib.crc32(json.dumps(document.get("body")).encode()), document.get("crc32")
        if found != written:
            raise RunError(f"{file} is damaged: its CRC is {found}, written was {written}; {self._otherwise(step)}")
        checkpoint = self._made(document["body"])
        if checkpoint.step != step:
            raise RunError(
                f"{file} is of step {checkpoint.step}; rename its directory to step-{checkpoint.step}, or "
                f"{self._otherwise(step)}"
            )
        return checkpoint

    def _intact(self, step: int) -> Checkpoint:
        """Opens it; RunError when a file is not there in its size."""
        checkpoint, sizes = self._open(step), self._storage.list()
        for fact in checkpoint.files.values():
            size = sizes.get(fact.name)
            if size != fact.num_bytes:
                found = "is not there" if size is None else f"has {size} bytes"
                raise RunError(
                    f"{self._storage.url(fact.name)} {found}, expected {fact.num_bytes} bytes; {self._otherwise(step)}"
                )
        return checkpoint

    def _otherwise(self, step: int) -> str:
        """What to do about a checkpoint that cannot be used."""
        older = [each for each in _complete(self._steps()) if each < step]
        return f"delete {self._storage.url(f'step-{step}')} to " + (
            f"resume from step {older[-1]}" if older else "begin anew: there is no older checkpoint"
        )

    def _made(self, body: Mapping[str, Any]) -> Checkpoint:
        files = [FileFact(**file) for file in body["files"]]
        snapshot = Snapshot.from_plain(body["snapshot"])
        return Checkpoint(snapshot, {file.name: file for file in files}, self._storage.url(f"step-{snapshot.step}"))

    # ---- what changes it ----

    def _discard_after(self, step: int) -> None:
        found = self._steps()
        for later in sorted(self._usable(found), reverse=True):
            if later > step:
                self._delete(later, found[later])

    def _seal(self, described: Mapping[str, Any], files: Sequence[FileFact]) -> Checkpoint:
        """Makes the checkpoint be there."""
        body = {"snapshot": described, "files": [dataclasses.asdict(file) for file in files]}
        text = json.dumps(body)
        crc = zlib.crc32(text.encode())
        document = f'{{"format": "{_FORMAT}", "version": {_VERSION}, "crc32": {crc}, "body": {text}}}\n'
        self.lease.confirm()
        self._storage.write(f"step-{described['step']}/{_STATE}", [document.encode()])
        return self._made(body)

    def tidy(self, keep: int | None = None) -> None:
        """Deletes what belongs to no checkpoint, and checkpoints beyond ``keep``; the lease must be held."""
        self.lease.confirm()
        steps = self._steps()
        usable = self._usable(steps)
        for step, files in steps.items():
            if _STATE not in files:
                self._delete(step, files)
            elif step in usable:
                self._delete(step, files, kept={f"step-{step}/{_STATE}", *usable[step].files})
        if keep is not None:
            spared = max((step for step, each in usable.items() if each.state["healthy"]), default=None)
            for step in sorted(usable)[:-keep]:
                if step != spared:
                    self._delete(step, steps[step])

    def _delete(self, step: int, files: Sequence[str], kept: Collection[str] = ()) -> None:
        """Deletes our files of a step, state.json first, and the directory unless there is something else in it."""
        self.lease.confirm()
        ours = [f"step-{step}/{name}" for name in files if _OURS.fullmatch(name)]
        gone = sorted((name for name in ours if name not in kept), key=lambda name: not name.endswith(_STATE))
        if len(gone) < len(files):
            for name in gone:
                self._storage.delete(name)
            return
        if _STATE in files:
            self._storage.delete(f"step-{step}/{_STATE}")
        self._storage.delete_directory(f"step-{step}")


def _complete(steps: Mapping[int, Sequence[str]]) -> list[int]:
    return sorted(step for step, files in steps.items() if _STATE in files)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _names(snapshot: Snapshot, attempt: str) -> dict[Any, str]:
    """Ref to the name of its file, for all that a snapshot refers to."""
    ranks = len(snapshot.learner_parts)
    stems = {ref: f"learner-{rank}-of-{ranks}" for rank, ref in enumerate(snapshot.learner_parts)}
    stems |= {ref: f"follower-{quote(role, safe='')}" for role, (_, ref) in snapshot.followers.items()}
    names = {ref: f"{stem}.{attempt}.safetensors" for ref, stem in stems.items()}
    payloads = dict.fromkeys(ref for entry in snapshot.entries for ref in (entry.rollouts, *entry.scores.values()))
    names |= {ref: f"payload-{number}.{attempt}.arrow" for number, ref in enumerate(payloads)}
    return {ref: f"step-{snapshot.step}/{name}" for ref, name in names.items()}


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot of names as JSON has it, independent of what may change it afterwards; NumPy's scalars become ours."""
    return json.loads(json.dumps(dataclasses.asdict(snapshot), default=lambda number: number.item()))


async def _all(calls: list[Awaitable[Any]]) -> list[Any]:
    """Every outcome; raises the first failure when all have ended, so that nothing goes on behind the caller's back."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
