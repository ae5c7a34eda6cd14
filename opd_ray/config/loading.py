"""From YAML and command line to a checked Config, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from opd_ray.config.whole import Config
from opd_ray.errors import InputError, near

_ADAPTER = TypeAdapter(Config)


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then the overrides. Raises InputError with one line."""
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
    return from_dict(raw)


def from_dict(raw: Any) -> Config:
    """A checked Config from nested plain values; unknown names and impossible values are refused."""
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise InputError(_one_line(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; ``from_dict(to_dict(c)) == c``."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One line of the reference that --help prints."""

    name: str
    default: Any
    doc: str


def describe() -> Iterator[FieldDoc]:
    """Every field as ``section.field`` with its default and sentence."""
    yield from _describe(Config(), "")


def _describe(section: Any, prefix: str) -> Iterator[FieldDoc]:
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _describe(value, f"{name}.")
        else:
            yield FieldDoc(name, value, _doc(type(section), field.name))


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
