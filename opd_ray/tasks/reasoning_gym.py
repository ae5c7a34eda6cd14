"""Procedural problems of the library `reasoning-gym`, judged by its own verifiers: data without a download.

A source ``reasoning_gym:NAME?key=value&…`` is a dataset of the library with its settings (`reasoning_gym:gcd?size=2000
&seed=1`). Its rows have, besides prompt, answer and the answer as response, what the verifier asks for: ``gym``, the
dataset, and ``entry``, the problem as the library made it. https://github.com/open-thought/reasoning-gym
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

import yaml

from opd_ray.errors import InputError, near
from opd_ray.tasks.words import InWords

SOURCE = "reasoning_gym"
"""How such a source begins, and the name of the task."""
_SEEDS_APART = 1_000_003
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymTask(InWords):
    """The `opd_ray.tasks.Task` for the rows of such sources."""

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Does the dataset's own ``score_answer`` give the whole score, 1, to the final answer of ``response``?

        That is the text in the last ``<answer>…</answer>`` or, without one, all that follows the thinking: the problems
        say "Give only the … as your final answer" and the like.
        """
        if "entry" not in row:
            return False
        return _dataset(row["gym"]).score_answer(_final_answer(response), row["entry"]) >= 1

    def load(self) -> None:
        """The library."""
        import reasoning_gym  # noqa: F401


def rows(source: str) -> Iterator[dict[str, Any]]:
    """The problems of ``reasoning_gym:NAME?key=value&…``. Raises InputError where there is no such dataset."""
    name = source.removeprefix(f"{SOURCE}:")
    dataset = _dataset(name)
    for index in range(dataset.size):
        entry = dataset[index]
        row = {"id": f"{name}#{index}", "prompt": entry["question"], "gym": name, "entry": entry}
        if isinstance(answer := entry["answer"], str):
            yield row | {"answer": answer, "response": answer}
        else:  # many are right, and the library names none
            yield row | {"answer": "any that follows the rules"}


@functools.lru_cache(maxsize=64)
def _dataset(source: str) -> Any:
    """The library's dataset for ``NAME?key=value&…``; without a seed that of 0, so that it is the same everywhere."""
    where = f"{SOURCE}:{source}"
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "reasoning_gym":
            raise
        raise InputError(f"{where} needs reasoning-gym, which is not installed; pip install 'opd_ray[gym]'") from None
    name, _, query = source.partition("?")
    if name not in DATASETS:
        raise InputError(f"{where}: reasoning-gym has no dataset {name!r}{near(name, DATASETS)}")
    given = parse_qsl(query, keep_blank_values=True)
    settings = {"seed": 0} | {key: _value(where, key, value) for key, value in given}
    fields = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    if unknown := [key for key in settings if key not in fields]:
        raise InputError(f"{where}: {name} has no setting {unknown[0]!r}{near(unknown[0], fields)}")
    # The library draws problem i with seed + i: neighbouring seeds would share all problems but one, and a held-out set
    # with the next seed would be nearly all of the training set.
    if type(settings["seed"]) is int:
        settings["seed"] *= _SEEDS_APART
    try:
        dataset = create_dataset(name, **settings)
        _ = dataset[0], range(dataset.size)[0]  # some look at their settings no earlier
        return dataset
    except Exception as error:  # the library asserts what its settings may be
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: reasoning-gym refuses these settings ({reason})") from None


def _value(where: str, key: str, written: str) -> Any:
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that no month has
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: its setting {key}={written} is no value ({reason}); write it as YAML has it"
        ) from None


def _final_answer(response: str) -> str:
    tagged = _TAGGED.findall(response)
    return (tagged[-1] if tagged else response.rpartition("</think>")[2]).strip()
