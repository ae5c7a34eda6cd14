"""One arm of a study: its configuration, and where its runs are."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import InputError

TEACHER_ROLLOUTS = "teacher-rollouts"
"""``data.golden: teacher-rollouts:N`` in an arm stands for N raw rollouts of the teacher."""
_OF_THE_METHOD = ("loss", "buffer", "guard", "reference")
"""Sections in which arms of the same rooms differ."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    raw: Mapping[str, Any]
    """Its configuration as nested plain values, without seed and name."""
    num_seeds: int | None = None
    """It runs on the first so many of the study's seeds; None for all."""

    def seeds(self, of_study: Sequence[int]) -> list[int]:
        """Those of the study's seeds that it runs on."""
        return list(of_study[: self.num_seeds])

    @property
    def directory(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def config(self, seed: int) -> Config:
        try:
            return configs.from_dict({**copy.deepcopy(dict(self.raw)), "seed": seed, "name": self.name})
        except InputError as error:
            raise InputError(f"arm '{self.name}': {error}") from None

    def without_golden(self) -> Arm:
        """Plain OPD with its models, prompts and rollouts: for what must be known before its golden data is there."""
        kept = {section: fields for section, fields in self.raw.items() if section not in _OF_THE_METHOD}
        plain = {
            "loss": {"golden": {"coef": 0}, "reference": {"coef": 0}},
            "buffer": {"golden_per_prompt": 0},
            "data": {**kept.get("data", {}), "golden": None},
            "rollout": {**kept.get("rollout", {}), "responses_per_prompt": 1},
        }
        return dataclasses.replace(self, raw={**kept, **plain})

    @property
    def teacher_rollouts(self) -> int:
        """How many raw rollouts of the teacher it trains on; 0 for another kind of data. InputError for no number."""
        golden = str(self.config(0).data.golden)
        kind, _, count = golden.partition(":")
        if kind != TEACHER_ROLLOUTS:
            return 0
        if not (count.isdecimal() and int(count) > 0):
            raise InputError(
                f"arm '{self.name}': data.golden is {golden}, expected {TEACHER_ROLLOUTS}:N with N above 0"
            )
        return int(count)

    def run_directory(self, directory: Path, seed: int) -> Path:
        """In the directory of the study."""
        return directory / self.directory / f"seed-{seed}"

    def summary(self, directory: Path, seed: int) -> dict[str, Any] | None:
        """The summary of a finished run; one that a signal stopped is run again."""
        path = self.run_directory(directory, seed) / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
        return summary if summary and summary.get("stopped_by") != "signal" else None
