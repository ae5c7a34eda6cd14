"""What a change of a field needs: nothing, another run, or other actors. An annotation on the field says which.

A field without one has its section's; a section without one binds nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import get_args, get_origin, get_type_hints


class Binds(enum.Flag):
    NOTHING = 0
    RUN = enum.auto()
    """A run that resumes must agree with the one it continues: the field decides what step n trains on, or in what form
    a checkpoint is."""
    ROOMS = enum.auto()
    """Runs that share their rooms must agree: the actors are started with it."""


NOTHING, RUN, ROOMS = Binds.NOTHING, Binds.RUN, Binds.ROOMS


@functools.cache
def binding(section: type, name: str, inherited: Binds = NOTHING) -> Binds:
    """What the field ``name`` (``section.field``) of a configuration class binds; one of another version, what its
    section does."""
    first, _, rest = name.partition(".")
    annotated = get_type_hints(section, include_extras=True).get(first)
    binds = next((each for each in get_args(annotated) if isinstance(each, Binds)), inherited)
    below = get_type_hints(section).get(first)
    if get_origin(below) is dict:  # more_teachers maps names to sections: the name is passed over
        below, rest = get_args(below)[1], rest.partition(".")[2]
    return binding(below, rest, binds) if rest and dataclasses.is_dataclass(below) else binds
