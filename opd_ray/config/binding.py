"""What a change of a field needs: nothing, another run, or other actors. An annotation on the field says which.

A field without one has its section's; a section without one binds nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args


class Binds(enum.Flag):
    NOTHING = 0
    RUN = enum.auto()
    """A run that resumes must agree with the one it continues: the field decides what step n trains on, or in what form
    a checkpoint is."""
    ROOMS = enum.auto()
    """Runs that share their rooms must agree: the actors are started with it."""


NOTHING, RUN, ROOMS = Binds.NOTHING, Binds.RUN, Binds.ROOMS


def differences(
    whole: type, one: Mapping[str, Any], other: Mapping[str, Any], binds: Binds
) -> Iterator[tuple[str, Any, Any]]:
    """Name (``section.field``) and both values of every field that ``binds`` so and in which two configurations
    differ. They are nested plain values of the class ``whole``; a field that one lacks is None there."""
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    for name in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(name), theirs.get(name)
        if mine != its and binds & binding(whole, name):
            yield name, mine, its


@functools.cache
def binding(section: type, name: str, inherited: Binds = NOTHING) -> Binds:
    """What the field ``name`` (``section.field``) of a configuration class binds."""
    first, _, rest = name.partition(".")
    field = next((base.__pydantic_fields__[first] for base in section.__mro__ if _has(base, first)), None)
    if field is None:  # of another version
        return inherited
    own = next((each for each in field.metadata if isinstance(each, Binds)), inherited)
    below = [each for each in (field.annotation, *get_args(field.annotation)) if dataclasses.is_dataclass(each)]
    if not rest or not below:
        return own
    # more_teachers maps names to sections: the name is passed over.
    return binding(below[0], rest if field.annotation is below[0] else rest.partition(".")[2], own)


def _has(base: type, name: str) -> bool:
    return name in getattr(base, "__pydantic_fields__", {})


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
