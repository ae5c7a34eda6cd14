"""What documents tell people to type, checked without running it: verbs, options, files, fields and their values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import yaml
from omegaconf import OmegaConf

from opd_ray import config as configs
from opd_ray.__main__ import cli
from opd_ray.errors import InputError

ROOT = Path(__file__).parents[2]
OWN = {
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"prompts": "p", "golden": "g", "evaluation": "e"},
}
"""What a part of a configuration with models of one's own leaves out."""
_COMMAND = re.compile(
    r"(?<![\w/.-])(?:~?[\w./-]*/)?(opd-ray|python -m opd_ray|python [\w./-]+\.py|make)(?= |$)([^'`|&;]*)"
)
_FIELD = re.compile(r"([a-z]\w*(?:\.\w+)+)(=.*)?")
_FILES = ("jsonl", "json", "yaml", "py", "html", "parquet", "md")
_FIELDS = {doc.name for doc in configs.describe()}
_OPEN = ("more_teachers", "student.lora", "evaluation.sets")
"""Sections, or any number of them, that there may be: what is in them is checked where a value is given."""
_SECTIONS = {".".join(name.split(".")[:depth]) for name in _FIELDS for depth in range(1, name.count(".") + 1)}


def problems(text: str) -> list[str]:
    """Every block and command of a document that would not be taken, with the reason."""
    ours = [block for block in blocks(text, "yaml") if yaml.safe_load(block).keys() & _SECTIONS]  # not Prometheus's
    found = [f"{error}: {block!r}" for block in ours for error in _in_yaml(block)]
    for command in commands(text):
        found += [f"{error}: {command!r}" for error in _in_command(*_COMMAND.match(command).groups())]
    return found + [f"{error}: {span!r}" for span in spans(text) for error in _in_span(span)]


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)  # each: where one ends none begins
    return [block for found, block in fenced if found == language]


def spans(text: str) -> list[str]:
    """Code within sentences, with a line's end as a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(text))]


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Everything that begins one of our commands, in blocks and in sentences, without comments and continued lines."""
    indented = "\n".join(re.findall(r"^    (\S.*)$", _prose(text), re.MULTILINE))
    lines = "\n".join([*blocks(text, ""), indented]).replace("\\\n", " ").splitlines()
    typed = [re.sub(r"(^|\s)#.*", "", line) for line in lines] + spans(text)
    return [found[0].strip() for line in typed for found in _COMMAND.finditer(line)]


def _in_yaml(block: str) -> Iterator[str]:
    whole = OmegaConf.merge(OWN, OmegaConf.create(yaml.safe_load(block)))
    if OmegaConf.select(whole, "evaluation.sets"):  # which have files of their own
        del whole.data.evaluation
    try:
        configs.from_dict(OmegaConf.to_container(whole))
    except (InputError, yaml.YAMLError) as error:
        yield str(error)


def _in_command(program: str, rest: str) -> Iterator[str]:
    words = ["1" if word == "N" else word for word in shlex.split(re.sub(r"[][]", " ", rest))]
    if program == "make":
        yield from _in_make(words)
    elif program in ("opd-ray", "python -m opd_ray"):
        yield from _in_verb(words)
    elif not (script := ROOT / program.split()[1]).is_file():
        yield f"there is no {script.relative_to(ROOT)}"
    elif script.name == "stableopd.py":
        yield from _in_verb(["train", *words])
    else:
        yield from _in_script(script, words)


def _in_verb(words: list[str]) -> Iterator[str]:
    if not words or words[0].startswith("-"):
        return
    verb = cli.commands.get(words[0])
    if verb is None:
        yield f"no verb {words[0]}; there are {', '.join(cli.commands)}"
    if verb is None or len(words) == 1:  # a sentence that speaks of it
        return
    try:
        given = verb.make_context(words[0], [word for word in words[1:] if word != "..."]).params
    except click.exceptions.Exit:  # --help
        return
    except (click.ClickException, InputError) as error:
        yield error.format_message() if isinstance(error, click.ClickException) else str(error)
        return
    file = given.get("config_file")
    yield from _in_overrides(given.get("overrides", ()), ROOT / file if file else None)


def _in_overrides(overrides: tuple[str, ...], file: Path | None = None) -> Iterator[str]:
    if file is not None and file.parent != ROOT and not file.is_file():
        yield f"there is no {file.relative_to(ROOT)}"
        return
    try:
        configs.load(file if file and file.is_file() else None, overrides)
    except InputError as error:
        # A part of a configuration may lack what it needs; what is there has to be right.
        if "is the embedded one" not in str(error):
            yield str(error)


def _in_script(script: Path, words: list[str]) -> Iterator[str]:
    text = script.read_text()
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        if f'"{option}"' not in text:
            yield f"{script.name} has no {option}"
    yield from _in_overrides(tuple(word for word in words if re.match(r"[a-z_.]+=", word)))


def _in_make(words: list[str]) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    known = re.findall(r"\b[A-Z_]+\b", makefile)
    asked = []
    for word in words:
        name, is_variable, value = word.partition("=")
        if not is_variable:
            asked.append(name)
            if name not in targets:
                yield f"no target {name}; there are {', '.join(targets)}"
        elif name not in known:
            yield f"the Makefile knows no {name}"
        elif name == "ARGS" and asked[-1:] in (["demo"], ["study"]):
            script = {"demo": "demo.py", "study": "ablation.py"}[asked[-1]]
            yield from _in_script(ROOT / "jobs" / script, shlex.split(value))


def _in_span(span: str) -> Iterator[str]:
    """A field that a sentence names, with or without a value."""
    found = _FIELD.fullmatch(span)
    if not found or found[1].split(".")[0] not in _SECTIONS or found[1].rpartition(".")[2] in _FILES:
        return
    name, value = found[1], found[2]
    if name not in _FIELDS | _SECTIONS and not any(name.startswith(f"{field}.") for field in _OPEN):
        yield f"no field {name}"
    elif value:
        try:
            configs.load(None, [span])
        except InputError as error:
            if re.search("unknown field|Input should be|, got ", str(error)):
                yield str(error)
