"""Checkpoints of a run: one directory per step, complete or absent.

A checkpoint is the learner's state (DeepSpeed's own format), the weights of scorers that follow the student, and a
state.json with the guard's memory and the place in the golden data. Nothing else is needed: prompt and sampling orders
are functions of the seed and of the step (see opd_ray.prompts), so a resumed run goes on with the first prompt
that was not trained.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_ray.errors import InputError
from opd_ray.pool import Pool

if TYPE_CHECKING:
    from opd_ray.pipeline import Rooms

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    """Optimizer steps it has behind it."""
    path: Path

    @property
    def learner(self) -> Path:
        return self.path / "learner"

    def follower(self, pool: Pool) -> Path:
        """Where the weights of a scorer that follows the student lie."""
        return self.path / "scorers" / pool.room

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())


def latest(run_dir: Path, *, healthy: bool = False) -> Checkpoint | None:
    """The newest complete checkpoint of a run, if it has one; with ``healthy``, the newest without an alarm."""
    found = [each for each in _complete(run_dir) if not healthy or each.state["healthy"]]
    return found[-1] if found else None


async def save(run_dir: Path, step: int, rooms: Rooms, keep: int, state: Mapping[str, Any]) -> Checkpoint:
    """Writes checkpoints/step-N under another name, renames it when it is whole, and deletes the oldest
    beyond ``keep``, but never the newest healthy one. A kill at any moment leaves the previous checkpoint usable."""
    final = Checkpoint(step, run_dir / "checkpoints" / f"step-{step}")
    partial = Checkpoint(step, final.path.with_name(f".{final.path.name}.partial"))
    shutil.rmtree(partial.path, ignore_errors=True)
    partial.learner.mkdir(parents=True)
    await rooms.learner.call_all("save_checkpoint", str(partial.learner))
    for pool in rooms.followers:
        partial.follower(pool).mkdir(parents=True)
        await pool.call_all("save_weights", str(partial.follower(pool)))
    saved = {"step": step, "num_ranks": len(rooms.learner), **state}
    (partial.path / "state.json").write_text(json.dumps(saved) + "\n")
    shutil.rmtree(final.path, ignore_errors=True)
    os.rename(partial.path, final.path)
    spared = latest(run_dir, healthy=True)
    for old in _complete(run_dir)[:-keep]:
        if old != spared:
            shutil.rmtree(old.path)
    return final


async def load(checkpoint: Checkpoint, rooms: Rooms) -> None:
    """Learner and followers go on from ``checkpoint``."""
    await rooms.learner.call_all("load_checkpoint", str(checkpoint.learner))
    for pool in rooms.followers:
        await pool.call_all("load_weights", str(checkpoint.follower(pool)))


def amend(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Writes other values into a checkpoint's state, all or none."""
    partial = checkpoint.path / ".state.json.partial"
    partial.write_text(json.dumps(checkpoint.state | dict(state)) + "\n")
    os.rename(partial, checkpoint.path / "state.json")


def discard_after(run_dir: Path, step: int) -> None:
    """Deletes the checkpoints of later steps: a run that goes back makes them anew."""
    for later in _complete(run_dir):
        if later.step > step:
            shutil.rmtree(later.path)


def check_ranks(checkpoint: Checkpoint, num_ranks: int) -> None:
    """Refuses to continue with another number of ranks than wrote the checkpoint."""
    saved = checkpoint.state["num_ranks"]
    if saved != num_ranks:
        raise InputError(
            f"{checkpoint.path}: written by {saved} learner ranks, but learner.num_ranks is {num_ranks}; "
            f"resume with learner.num_ranks={saved}"
        )


def _complete(run_dir: Path) -> list[Checkpoint]:
    found = []
    for path in (run_dir / "checkpoints").glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name and (path / "state.json").is_file():
            found.append(Checkpoint(int(name[1]), path))
    return sorted(found, key=lambda each: each.step)
