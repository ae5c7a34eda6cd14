"""Every arm's own learning rate, by one rule that is the same for all.

Each arm runs at each of the study's rates on the tuning seeds, whose students no study reports. The runs are a study of
their own (an arm for each pair of arm and rate) and go on where they stopped. What was chosen stands in a YAML file
with the accuracies that it was chosen by; a study that names the file runs its arms at these rates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from opd_ray.config import merged
from opd_ray.disk import whole
from opd_ray.errors import InputError
from opd_ray.study.arms import Arm

RULE = "the rate with the highest mean sampled accuracy after the last step over the tuning seeds; of equals the lowest"
BEYOND = 2
"""So often the best rate, where it is the lowest or the highest of those tried, is halved or doubled and tried too."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tried, and where the outcome stands."""

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """From the lowest to the highest."""
    chosen: Path

    def arms(self, arms: Sequence[Arm]) -> list[Arm]:
        """One for each of ``arms`` at each rate. InputError where nothing would be measured to choose by."""
        if blind := next((arm for arm in arms if arm.config(self.seeds[0]).evaluation.num_problems == 0), None):
            raise InputError(
                f"arm '{blind.name}': evaluation.num_problems is 0, but rates are chosen by held-out accuracy; raise it"
            )
        return [self.at(arm, rate) for arm in arms for rate in self.rates]

    def beyond(self, arms: Sequence[Arm], found: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
        """Each of ``arms`` whose rate in ``found`` (of :meth:`choose`) is at the edge, at the next rate there."""
        further = self._in_reach()
        at_edge = [(arm, found[arm.name]) for arm in arms if self.at_the_edge(found[arm.name])]
        return [
            self.at(arm, further[place])
            for arm, choice in at_edge
            for place in [further.index(choice["lr"]) + (1 if choice["lr"] == max(_tried(choice)) else -1)]
            if 0 <= place < len(further)
        ]

    def _in_reach(self) -> list[float]:
        """The rates, and those beyond their edges that may be tried; from the lowest to the highest."""
        lower = [float(f"{self.rates[0] / 2**times:g}") for times in range(BEYOND, 0, -1)]
        return [*lower, *self.rates, *(float(f"{self.rates[-1] * 2**times:g}") for times in range(1, BEYOND + 1))]

    @staticmethod
    def at(arm: Arm, rate: float) -> Arm:
        return Arm(f"{arm.name}, lr {rate:g}", merged(arm.raw, {"learner": {"lr": rate}}))

    def choose(self, arms: Sequence[Arm], directory: Path) -> dict[str, dict[str, Any]]:
        """By RULE, from the runs in ``directory``: of each arm its rate and the accuracies of all rates by seed, which
        are written into the file beside what it says of other arms."""
        found = {arm.name: self._choice(arm, directory) for arm in arms}
        everything = {**self._read(), **found}
        lines = OmegaConf.to_yaml(OmegaConf.create(everything))
        with whole(self.chosen) as partial:
            partial.write_text(f"# Written by `python jobs/ablation.py --tune`: {RULE}.\n{lines}")
        return found

    def _choice(self, arm: Arm, directory: Path) -> dict[str, Any]:
        each = {rate: self._accuracies(arm, rate, directory) for rate in self._in_reach()}
        each = {rate: values for rate, values in each.items() if values or rate in self.rates}
        best = max(each, key=lambda rate: (fmean(each[rate]), -rate))
        accuracies = {f"{rate:g}": [round(value, 4) for value in values] for rate, values in each.items()}
        return {"lr": best, "seeds": list(self.seeds), "settings": _digest(arm.raw), "accuracies": accuracies}

    def _accuracies(self, arm: Arm, rate: float, directory: Path) -> list[float]:
        """Held out, sampled, after the last step, of each tuning seed; none where one of them has not run."""
        summaries = [self.at(arm, rate).summary(directory, seed) for seed in self.seeds]
        return [each["eval_after"]["accuracy_sampled"] for each in summaries if each] if all(summaries) else []

    def chosen_rates(self) -> dict[str, float]:
        """Of every arm that one was chosen for; none where there is no file yet. Raises InputError."""
        return {name: choice["lr"] for name, choice in self._read().items()}

    @staticmethod
    def at_the_edge(choice: Mapping[str, Any]) -> bool:
        """Is the chosen rate the lowest or the highest that was tried, so that one beyond may be better?"""
        return choice["lr"] in (min(_tried(choice)), max(_tried(choice)))

    def looked_at(self) -> set[int]:
        """The seeds that rates are chosen on, and those that the rates in the file were, which may be others."""
        return {*self.seeds, *(seed for choice in self._read().values() for seed in choice.get("seeds", ()))}

    def chosen_otherwise(self, name: str, *raws: Mapping[str, Any]) -> bool:
        """Was the rate of an arm chosen with settings that are none of these?"""
        settings = self._read().get(name, {}).get("settings")
        return settings is not None and settings not in map(_digest, raws)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.chosen.exists():
            return {}
        try:
            raw = OmegaConf.to_container(OmegaConf.load(self.chosen)) or {}
        except (OSError, YAMLError) as error:
            raise InputError(f"{self.chosen}: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{self.chosen}: expected a mapping of arms to their rates; delete it, and tune again")
        for name, choice in raw.items():
            if not isinstance(choice, dict) or not isinstance(choice.get("lr"), float) or choice["lr"] <= 0:
                raise InputError(f"{self.chosen}: arm '{name}' has no lr, a number above 0; delete it, and tune again")
        return raw


def _digest(raw: Mapping[str, Any]) -> str:
    """Of an arm's settings, whatever its learning rate."""
    learner = {name: value for name, value in raw.get("learner", {}).items() if name != "lr"}
    return hashlib.sha256(json.dumps({**raw, "learner": learner}, sort_keys=True).encode()).hexdigest()[:16]


def _tried(choice: Mapping[str, Any]) -> list[float]:
    return [float(rate) for rate in choice["accuracies"]]
