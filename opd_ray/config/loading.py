"""From YAML and command line to a checked Config, and back.

The defaults of the sections are those of the field, for models of any size. The small embedded models need others
(a learning rate a thousand times as large, a window of 40 characters): embedded.yaml, merged under a configuration
whose student is the embedded one and under no other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from opd_ray.config import binding
from opd_ray.config.binding import Binds
from opd_ray.config.sections import EMBEDDED
from opd_ray.config.whole import Config
from opd_ray.errors import InputError, near

_ADAPTER = TypeAdapter(Config)


def load(path: Path | None = None, overrides: Sequence[str] = (), *, evaluation_only: bool = False) -> Config:
    """Defaults, then the YAML file, then the overrides. Raises InputError with one line.

    ``evaluation_only``: nothing is to be trained, so no teacher and no prompts are missed.
    """
    merged = OmegaConf.create({})
    try:
        if path is not None:
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise InputError(f"{path}: expected a mapping of sections, got a list")
            merged = loaded
        for override in overrides:
            if "=" not in override:
                raise InputError(f"override '{override}' is not of the form section.field=value")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; give an existing YAML file") from None
    except (YAMLError, OmegaConfBaseException) as error:
        where = f"--config {path}" if path else "overrides"
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    return from_dict(raw, evaluation_only=evaluation_only)


def from_dict(raw: Any, *, evaluation_only: bool = False) -> Config:
    """A checked Config from nested plain values; unknown names and impossible values are refused."""
    own = _student_of(raw) != EMBEDDED
    try:
        config = _ADAPTER.validate_python(raw if own else _merged(embedded_preset(), raw))
    except ValidationError as error:
        raise InputError(_one_line(error)) from None
    if own:
        _check_nothing_embedded(config, evaluation_only)
    return config


@functools.cache
def embedded_preset() -> dict[str, Any]:
    """What the embedded models have in place of the defaults, as nested plain values."""
    return OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("embedded.yaml")))


def _student_of(raw: Any) -> Any:
    student = raw.get("student") if isinstance(raw, Mapping) else None
    return student.get("path", EMBEDDED) if isinstance(student, Mapping) else EMBEDDED


def _merged(below: Any, above: Any) -> Any:
    """``above``, with what it leaves out taken from ``below``; anything but mappings replaces what is below it."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _check_nothing_embedded(config: Config, evaluation_only: bool) -> None:
    """Raises InputError where a student of one's own would meet embedded data or the embedded teacher by default."""
    data, where = config.data, f"student.path is {config.student.path}, but"
    scorers = {**config.teachers, **({"reference": config.reference} if config.uses_reference else {})}
    teachers_write = config.uses_teacher or config.buffer.uses_teacher_rollouts
    for field, value, needed, mend in (
        *(
            (f"{name}.path", scorer.path, teachers_write or name == "reference", f"give {name}.path=DIRECTORY")
            for name, scorer in scorers.items()
        ),
        ("data.prompts", data.prompts, config.buffer.prompts_per_step > 0, "give data.prompts=FILE"),
        (
            "data.evaluation",
            data.evaluation,
            config.evaluation.num_problems > 0,
            "give data.evaluation=FILE, or evaluation.num_problems=0 to evaluate nothing",
        ),
    ):
        if needed and value == EMBEDDED and (field == "data.evaluation" or not evaluation_only):
            raise InputError(f"config: {where} {field} is the embedded one, made for the embedded student; {mend}")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; ``from_dict(to_dict(c)) == c``."""
    return _ADAPTER.dump_python(config, mode="json")


def differences(one: Config | Mapping[str, Any], other: Config, binds: Binds) -> Iterator[tuple[str, Any, Any]]:
    """``section.field`` and both values of every field that ``binds`` so and in which two configurations differ."""
    plain = to_dict(one) if isinstance(one, Config) else one
    return binding.differences(Config, plain, to_dict(other), binds)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One line of the reference that --help prints."""

    name: str
    default: Any
    embedded: Any
    """Its value with the embedded student."""
    doc: str


def describe() -> Iterator[FieldDoc]:
    """Every field as ``section.field`` with its default and sentence."""
    yield from _describe(Config(), from_dict({}), "")


def _describe(section: Any, embedded: Any, prefix: str) -> Iterator[FieldDoc]:
    for field in dataclasses.fields(section):
        value, there, name = getattr(section, field.name), getattr(embedded, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _describe(value, there, f"{name}.")
        else:
            yield FieldDoc(name, value, there, _doc(type(section), field.name))


def _doc(cls: type, name: str) -> str:
    """A field's sentence; pydantic does not pass it on to a section that inherits the field."""
    found = (
        base.__pydantic_fields__[name].description for base in cls.__mro__[:-1] if name in base.__pydantic_fields__
    )
    return next(filter(None, found), "")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    # A schedule is a number or points; pydantic names the form that it tried last.
    where = ".".join(str(part) for part in first["loc"] if part != "float" and not str(part).startswith("tuple["))
    if first["type"] == "unexpected_keyword_argument":
        section, _, _ = where.rpartition(".")
        siblings = {".".join(field.name.split(".")[: len(first["loc"])]) for field in describe()}
        known = [name for name in siblings if name.startswith(section)]
        return f"config: unknown field '{where}'{near(where, known)}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"config: {where + ': ' if where else ''}{message}{got}"
