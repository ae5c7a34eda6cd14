"""Checkpoints of a run: one directory per step, complete or absent.

A checkpoint is the learner's state (DeepSpeed's own format) and a state.json. Nothing else is needed:
prompt, golden and sampling orders are functions of the seed and of the step (see opd_ray.prompts, opd_ray.buffer),
so a resumed run goes on with the first prompt that was not trained.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from opd_ray.errors import InputError
from opd_ray.pool import Pool

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


def latest(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, if it has one."""
    found = _complete(run_dir)
    return found[-1] if found else None


async def save(run_dir: Path, step: int, learner: Pool, keep: int) -> Checkpoint:
    """Writes checkpoints/step-N under another name, renames it when it is whole, and deletes the oldest
    beyond ``keep``. A kill at any moment leaves the previous checkpoint usable."""
    final = run_dir / "checkpoints" / f"step-{step}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "learner").mkdir(parents=True)
    await learner.call_all("save_checkpoint", str(partial / "learner"))
    (partial / "state.json").write_text(json.dumps({"step": step, "num_ranks": len(learner)}) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    for old in _complete(run_dir)[:-keep]:
        shutil.rmtree(old.path)
    return Checkpoint(step, final)


def check_ranks(checkpoint: Checkpoint, num_ranks: int) -> None:
    """Refuses to continue with another number of ranks than wrote the checkpoint."""
    saved = json.loads((checkpoint.path / "state.json").read_text())["num_ranks"]
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
