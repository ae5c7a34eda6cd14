"""A study file, read and checked.

YAML with these keys, of which ``arms`` is needed here or in the file that it extends:

    extends: FILE     another study, whose keys come first; arms and claims are added to its own
    seeds:            {first, number}: those it runs on, unless the caller says others
    tuning:           {seeds, rates, chosen}: how each arm gets its learning rate (:mod:`opd_ray.study.tuning`)
    common:           settings of every arm
    arms:             by name what each changes, and ``seeds``, where it runs on the first few only
    claims:           what they should show (:mod:`opd_ray.study.claims`)

Paths are relative to the file that names them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opd_ray.config import check_form, merged
from opd_ray.errors import InputError
from opd_ray.study import claims
from opd_ray.study.arms import Arm
from opd_ray.study.tuning import Tuning

_KEYS = {"extends", "seeds", "tuning", "common", "arms", "claims"}
_SEEDS = {"first": 0, "number": 5}
_MOST_SEEDS = 100
"""A larger number is a seed that lacks its comma."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says."""

    arms: list[Arm]
    claims: list[Mapping[str, Any]]
    first_seed: int = _SEEDS["first"]
    num_seeds: int = _SEEDS["number"]
    tuning: Tuning | None = None
    untuned: tuple[str, ...] = ()
    """Arms that have the learning rate of the study file, because none has been chosen for them."""
    chosen_otherwise: tuple[str, ...] = ()
    """Arms whose learning rate was chosen with other settings than those of the study file or of now."""

    def seeds(self, asked: str = "") -> list[int]:
        """Those of the file; "N": so many from its first on; "A,B": these; "7," is the one seed 7. InputError for one
        that rates are tuned on."""
        parts = [part.strip() for part in asked.split(",")]
        listed = [part for part in parts if part]
        if asked and (not listed or not all(part.isdecimal() for part in listed) or asked.strip() == "0"):
            raise InputError(f"--seeds {asked}: expected a number of seeds, or seeds as 300,301")
        if len(parts) == 1 and listed and int(asked) > _MOST_SEEDS:
            raise InputError(f"--seeds {asked}: expected {_MOST_SEEDS} seeds at most; the one seed is '{asked},'")
        if len(parts) > 1:
            found = list(dict.fromkeys(map(int, listed)))
        else:
            found = [self.first_seed + at for at in range(int(asked) if asked else self.num_seeds)]
        if self.tuning and (tuned := sorted(set(found) & self.tuning.looked_at())):
            raise InputError(f"--seeds: learning rates are chosen on seed {tuned[0]}; report others")
        return found


def read_study(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = (), *, tuned: bool = True) -> Study:
    """A study file; ``overrides`` hold for all arms, ``only`` picks some by name or directory, in that order. Without
    ``tuned`` the learning rates are those of the file, whatever has been chosen."""
    raw = _read(path)
    check_form(overrides)
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:  # Python's, of a number of thousands of digits
        raise InputError(f"study {path}: {' '.join(str(error).split())}") from None
    if not raw.get("arms"):
        raise InputError(f"study {path}: expected 'arms', a mapping of names to settings; {_beside()}")
    seeds, tuning = _seeds(path, raw), _tuning(path, raw)
    chosen = tuning.chosen_rates() if tuning and tuned else {}
    arms, untuned, otherwise = [], [], []
    for name, own in raw["arms"].items():
        if not isinstance(name, str) or not isinstance(own, dict | None):
            raise InputError(f"study {path}: arm {name!r} is {own!r}, expected a name in quotes and its settings")
        own = dict(own or {})
        num_seeds = own.pop("seeds", None)
        if num_seeds is not None and (not isinstance(num_seeds, int) or num_seeds < 1):
            raise InputError(f"study {path}: arm '{name}': seeds is {num_seeds!r}, expected how many: 1 or more")
        rate = {"learner": {"lr": chosen[name]}} if name in chosen else {}
        of_file = merged(raw.get("common") or {}, own)
        arms.append(Arm(name, merged(merged(of_file, rate), changes), num_seeds))
        if given := {"seed", "name"} & arms[-1].raw.keys():
            raise InputError(
                f"study {path}: arm '{name}' has the field {min(given)}, but its runs are of the study's seeds and "
                "have its own name; leave it out, and choose seeds with --seeds or under seeds"
            )
        untuned += [name] * (not rate)
        if rate and tuning.chosen_otherwise(name, of_file, arms[-1].raw):
            otherwise.append(name)
    _check_apart(path, arms)
    known = {name: arm for arm in arms for name in (arm.name, arm.directory)}
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"study {path}: no arm '{unknown[0]}'; it has {', '.join(arm.directory for arm in arms)}")
    picked = list({known[name].name: known[name] for name in only}.values()) if only else arms
    for arm in picked:
        _ = arm.teacher_rollouts  # refuses a contradiction before anything starts
    stated = raw.get("claims") or []
    claims.check(stated, [arm.name for arm in arms])
    names = {arm.name for arm in picked}
    left, other = (tuple(name for name in each if name in names) for each in (untuned, otherwise))
    return Study(picked, stated, seeds["first"], seeds["number"], tuning, left, other)


def _check_apart(path: Path, arms: Sequence[Arm]) -> None:
    """Arms in one directory would take each other's runs for their own."""
    named: dict[str, str] = {}
    for arm in arms:
        if (other := named.setdefault(arm.directory, arm.name)) != arm.name:
            raise InputError(
                f"study {path}: the arms '{other}' and '{arm.name}' have one directory, {arm.directory}; give one of "
                "them a name with other letters or digits"
            )


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file with all that it extends."""
    if path.resolve() in extended_by:
        raise InputError(f"study {path}: it extends itself; leave out extends in one of the files")
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise InputError(f"study {path}: {error.strerror}; give an existing YAML file") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:  # and what is not UTF-8
        raise InputError(f"study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or (unknown := set(raw) - _KEYS):
        what = f"key '{sorted(map(str, unknown))[0]}'" if isinstance(raw, dict) else "no mapping"
        raise InputError(f"study {path}: {what}: expected 'arms', a mapping of names to settings; {_beside()}")
    for key, kind, what in (("arms", dict, "a mapping"), ("common", dict, "a mapping"), ("claims", list, "a list")):
        if not isinstance(raw.get(key), kind | None):
            raise InputError(f"study {path}: {key} is {raw[key]!r}, expected '{key}', {what}; {_beside()}")
    if isinstance(tuning := raw.get("tuning"), dict) and "chosen" in tuning:
        tuning["chosen"] = str(path.parent / str(tuning["chosen"]))
    if "extends" not in raw:
        return raw
    base = _read(path.parent / str(raw.pop("extends")), (*extended_by, path.resolve()))
    if twice := [name for name in raw.get("arms") or {} if name in (base.get("arms") or {})]:
        raise InputError(f"study {path}: arm '{twice[0]}' is in the study that it extends, too; give it another name")
    common = merged(base.get("common") or {}, raw.get("common") or {})
    arms = {**(base.get("arms") or {}), **(raw.get("arms") or {})}
    stated = [*(base.get("claims") or []), *(raw.get("claims") or [])]
    return {**base, **raw, "common": common, "arms": arms, "claims": stated}


def _seeds(path: Path, raw: Mapping[str, Any]) -> dict[str, int]:
    given = raw.get("seeds") or {}
    numbers = isinstance(given, dict) and all(isinstance(value, int) for value in given.values())
    if not numbers or set(given) - set(_SEEDS) or given.get("number", 1) < 1 or given.get("first", 0) < 0:
        raise InputError(f"study {path}: seeds is {given}, expected first and number, as {{first: 300, number: 5}}")
    return _SEEDS | given


def _tuning(path: Path, raw: Mapping[str, Any]) -> Tuning | None:
    given = raw.get("tuning")
    if given is None:
        return None
    shape = isinstance(given, dict) and set(given) == {"seeds", "rates", "chosen"}
    seeds, rates = (given["seeds"], given["rates"]) if shape else ([], [])
    fits = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
    fits &= isinstance(rates, list) and all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates)
    if not (fits and seeds and rates):
        raise InputError(
            f"study {path}: tuning is {given}, expected seeds (whole numbers), rates (numbers above 0, as 0.001) and "
            "chosen (a file)"
        )
    return Tuning(tuple(dict.fromkeys(seeds)), tuple(sorted(set(rates))), Path(given["chosen"]))


def _beside() -> str:
    return f"beside it {', '.join(sorted(_KEYS - {'arms'}))}"
