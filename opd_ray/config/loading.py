"""From YAML and command line to a checked Config, and back.

The defaults of the sections are those of the field, for models of any size. The small embedded models need others
(a learning rate a thousand times as large, a window of 40 characters): embedded.yaml, and over it embedded-hard.yaml
for the harder setting, merged under a configuration whose student is the embedded one and under no other.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from opd_ray.config.binding import Binds, binding
from opd_ray.config.data import (
    EMBEDDED,
    EMBEDDED_HARD,
    EMBEDDED_STUDENTS,
    EMBEDDED_TEACHERS,
    OF_SHORT_CHAINS,
    OTHER_END,
    EvaluationSet,
    set_field,
)
from opd_ray.config.hints import hint
from opd_ray.config.keys import check_no_keys
from opd_ray.config.sections import LoraConfig, RepetitionConfig
from opd_ray.config.whole import Config
from opd_ray.errors import InputError, near

_ADAPTER = TypeAdapter(Config)
_MOST_BYTES = 2**20
_MOST_DOTS = 20
_MOST = 2**53
"""Largest whole number that floating point, JSON and every library have."""
_WITHIN = f"expected a number within ±{_MOST}"


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    sections: Mapping[str, Any] | None = None,
    *,
    evaluation_only: bool = False,
) -> Config:
    """Defaults, then the YAML file, then ``sections`` (nested plain values), then the overrides. Raises InputError with
    one line.

    ``evaluation_only``: nothing is to be trained, so no teacher and no prompts are missed.
    """
    check_form(overrides)
    where = f"--config {path}" if path else "overrides"
    try:
        given = OmegaConf.create({}) if path is None else OmegaConf.load(io.StringIO(_text(path)))
        if not OmegaConf.is_dict(given):
            raise InputError(f"{path}: expected a mapping of sections, got a list")
        if path is not None and not given:
            raise InputError(
                f"--config {path}: sets nothing; set a field (opd-ray init writes them all), or leave --config out"
            )
        raw = OmegaConf.to_container(
            OmegaConf.merge(given, sections or {}, OmegaConf.from_dotlist(list(overrides))), resolve=True
        )
    except TypeError:
        raise InputError(
            f"{where}: a list stands where options have a section of fields; give one of the two"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply; expected sections of fields") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: has half a surrogate pair, which is no text; give UTF-8") from None
    except (YAMLError, OmegaConfBaseException, OSError) as error:  # an OSError, oddly, where it is no mapping or list
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    except ValueError:  # Python's, which reads no more than 4300 digits
        raise InputError(f"{where}: has a number of thousands of digits; {_WITHIN}") from None
    return from_dict(raw, evaluation_only=evaluation_only)


def check_form(overrides: Sequence[str]) -> None:
    """Raises InputError for one that is not section.field=value."""
    for override in overrides:
        if "=" not in override:
            mend = f"; a file is read with --config {override}" if override.endswith((".yaml", ".yml")) else ""
            raise InputError(f"override '{override}' is not of the form section.field=value{mend}")
        if (name := override.partition("=")[0]).count(".") > _MOST_DOTS:
            raise InputError(f"override '{name[:60]}...': is nested too deeply; expected section.field=value")


def _text(path: Path) -> str:
    """A file of the size that a configuration can have, whatever it is."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"--config {path}: is no file; give an existing YAML file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--config {path}: {reason}; give an existing YAML file") from None
    if len(data) > _MOST_BYTES:
        raise InputError(f"--config {path}: has more than {_MOST_BYTES} bytes; expected a YAML file of sections")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: is not UTF-8 text (byte {error.start}); expected a YAML file") from None


def from_dict(raw: Any, *, evaluation_only: bool = False) -> Config:
    """A checked Config from nested plain values; unknown names and impossible values are refused."""
    _check_whole_numbers(raw, "config")
    student = raw.get("student") if isinstance(raw, Mapping) else None
    path = student.get("path", EMBEDDED) if isinstance(student, Mapping) else EMBEDDED
    if path in EMBEDDED_STUDENTS:
        raw = merged(embedded_preset(path), raw)
    check_no_keys(raw)
    try:
        config = _ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise InputError(_one_line(error)) from None
    _check_no_switches(raw, to_dict(config))
    _check_words(config)
    if config.student.path not in EMBEDDED_STUDENTS:
        _check_nothing_embedded(config, evaluation_only)
    return config


def merged(under: Any, over: Any) -> Any:
    """Sections in one, what is over the others where both say something; neither is changed.

    OmegaConf's copies of all take ten times as long as the rest of a configuration; a list in a section's place is a
    TypeError of its merge, and ??? no value at all.
    """
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    return {**under, **{name: merged(under.get(name), value) for name, value in over.items()}}


def _check_no_switches(raw: Any, read: Any, name: str = "config: ") -> None:
    """Refuses a truth value where it was read as the number 1 or 0."""
    if isinstance(raw, Mapping) and isinstance(read, Mapping):
        for key in raw.keys() & read.keys():
            _check_no_switches(raw[key], read[key], f"{name}{key}" if name.endswith(" ") else f"{name}.{key}")
    elif isinstance(raw, list) and isinstance(read, list):
        for given, made in zip(raw, read, strict=False):
            _check_no_switches(given, made, name)
    elif isinstance(raw, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        raise InputError(f"{name}: is {str(raw).lower()}, expected a number")


def _check_whole_numbers(raw: Any, where: str) -> None:
    if isinstance(raw, int) and abs(raw) > _MOST:
        raise InputError(f"{where}: has {len(str(abs(raw)))} digits; {_WITHIN}")
    for name, value in raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ():
        _check_whole_numbers(value, f"config: {name}" if where == "config" else f"{where}.{name}")


@functools.cache
def embedded_preset(student: str = EMBEDDED) -> dict[str, Any]:
    """What the embedded models have in place of the defaults, as nested plain values."""
    files = (Path(__file__).with_name(f"{name}.yaml") for name in dict.fromkeys((EMBEDDED, student)))
    return OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)))


def _check_words(config: Config) -> None:
    """Raises InputError for a path that is nearly one of the words for what the package makes itself, and for a teacher
    that does not know the student's problems: before a student is built, which takes a minute."""
    words = {"student.path": EMBEDDED_STUDENTS}
    words |= {"teacher.path": EMBEDDED_TEACHERS, "reference.path": (EMBEDDED, OTHER_END)}
    words |= {"data.golden": (EMBEDDED, f"{EMBEDDED}:N", f"{EMBEDDED}:prompts")}
    words |= {f"more_teachers.{name}.path": EMBEDDED_TEACHERS for name in config.more_teachers}
    paths = {"student": config.student, "teacher": config.teacher, "reference": config.reference}
    given = {f"{name}.path": each.path for name, each in paths.items()}
    given |= {f"more_teachers.{name}.path": each.path for name, each in config.more_teachers.items()}
    given |= {"data.prompts": config.data.prompts, "data.golden": config.data.golden}
    given |= {set_field(name): each.path for name, each in config.evaluation_sets.items()}
    for field, path in given.items():
        known = words.get(field, (EMBEDDED,))
        if isinstance(path, str) and path.startswith(f"{EMBEDDED}-") and "/" not in path and path not in known:
            raise InputError(
                f"config: {field} is {path}, expected {' or '.join(known)}, or ./{path} for a file or directory of "
                f"that name{_whose_word(path) or near(path, known)}"
            )
        if config.student.path == EMBEDDED_HARD and path in OF_SHORT_CHAINS:
            raise InputError(
                f"config: {field} is {path}, a teacher of the problems of student.path={EMBEDDED}, but student.path is "
                f"{EMBEDDED_HARD}; take that student, or another teacher"
            )


def _whose_word(path: str) -> str:
    """A clause for a word of other fields than the one it was given for; empty for no word."""
    if path in EMBEDDED_STUDENTS:
        return f"; it is a word of student.path, and {EMBEDDED} stands for the teacher and the data of that student"
    return "; it is a word of teacher.path" if path in EMBEDDED_TEACHERS else ""


def _check_nothing_embedded(config: Config, evaluation_only: bool) -> None:
    """Raises InputError where a student of one's own would meet embedded data or the embedded teacher by default."""
    needed = []
    if not evaluation_only:
        models = {role: scorer for role, scorer in config.scorers.items() if not scorer.url}
        models |= config.teachers if config.buffer.has_teacher_write else {}
        needed += [(f"{name}.path", model.path, f"give {name}.path=DIRECTORY") for name, model in models.items()]
        if config.buffer.prompts_per_step > 0:
            needed.append(("data.prompts", config.data.prompts, "give data.prompts=FILE"))
    for name, each in config.evaluation_sets.items():
        mend = f"give {set_field(name)}=FILE, or evaluation.num_problems=0 to evaluate nothing"
        needed.append((set_field(name), each.path, mend))
    for field, value, mend in needed:
        if value in EMBEDDED_TEACHERS:
            raise InputError(
                f"config: student.path is {config.student.path}, but {field} is the embedded one, made for the "
                f"embedded student; {mend}"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; ``from_dict(to_dict(c)) == c``."""
    return _ADAPTER.dump_python(config, mode="json")


def differences(one: Config | Mapping[str, Any], other: Config, binds: Binds) -> Iterator[tuple[str, Any, Any]]:
    """``section.field`` and both values of every field that ``binds`` so and in which two configurations differ; a
    field that one lacks is None there."""
    ours, theirs = dict(leaves(to_dict(one) if isinstance(one, Config) else one)), dict(leaves(to_dict(other)))
    for name in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(name), theirs.get(name)
        if mine != its and binds & binding(Config, name):
            yield name, mine, its


def leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``section.field`` and its value, of nested mappings."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


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
    section: str
    """What the section is that has the field."""
    choices: tuple[Any, ...] = ()
    """All values that it takes, where they are words of ours."""

    @property
    def text(self) -> str:
        """Its sentence, and the choices where that does not name them all."""
        if all(re.search(rf"(?<!\w){re.escape(str(each))}(?!\w)", self.doc) for each in self.choices):
            return self.doc
        return f"{self.doc} One of {', '.join(map(str, self.choices))}."


def describe() -> Iterator[FieldDoc]:
    """Every field as ``section.field`` with its default and sentence."""
    yield from _describe(Config(), from_dict({}), "")


def describe_absent(name: str = "NAME") -> Iterator[FieldDoc]:
    """The same of sections that no run has by itself; one of evaluation.sets under its ``name``."""
    for absent, prefix in (
        (LoraConfig(), "student.lora."),
        (RepetitionConfig(), "rollout.repetition_detection."),
        (EvaluationSet(), f"evaluation.sets.{name}."),
    ):
        yield from _describe(absent, absent, prefix)


def _describe(section: Any, embedded: Any, prefix: str) -> Iterator[FieldDoc]:
    hints = get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        value, there, name = getattr(section, field.name), getattr(embedded, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _describe(value, there, f"{name}.")
        else:
            doc, choices = _doc(type(section), field.name), _choices(hints[field.name])
            yield FieldDoc(name, value, there, doc, type(section).__doc__ or "", choices)


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    # Of what is annotated, and of each in a list; what also takes other values has no choices.
    return _choices(get_args(hint)[0]) if get_origin(hint) in (Annotated, tuple) else ()


def _doc(cls: type, name: str) -> str:
    """A field's sentence; pydantic does not pass it on to a section that inherits the field."""
    found = (
        base.__pydantic_fields__[name].description for base in cls.__mro__[:-1] if name in base.__pydantic_fields__
    )
    return next(filter(None, found), "")


def _one_line(error: ValidationError) -> str:
    # A schedule is a number or points, sources are one or a list: pydantic complains of each form, in the right one of
    # what is deepest in it, and names the forms.
    first = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    forms = ("float", "str", "SourceConfig", "tuple[", "literal[")
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(forms))
    if first["type"] == "unexpected_keyword_argument":
        if "." in (name := str(first["loc"][-1])):
            nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
            return f"config: unknown field '{where}'; in a file a field stands in its section, as {nested}"
        section, _, _ = where.rpartition(".")
        every = (*describe(), *describe_absent(*first["loc"][2:3]))
        siblings = {".".join(field.name.split(".")[: len(first["loc"])]) for field in every}
        known = sorted(name for name in siblings if name.startswith(section))
        return f"config: unknown field '{where}'{hint(where, known, [field.name for field in every])}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"config: {where + ': ' if where else ''}{message}{got}"
