"""A configuration file to be read and edited: every field under its sentence, those that are not set commented out."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from opd_ray.config.loading import FieldDoc, describe

_WIDTH = 120
_HOW = (
    "A field that is commented out has the value that stands there. To set it, take away the # at the start of its "
    'line and of the line that names its section. A path "embedded" stands for what comes with the package.'
)


def commented(given: str, origin: str) -> str:
    """The YAML file ``given`` with its head and its values as they are written, and all other fields beside them.

    ``origin`` says in a sentence where the file is from.
    """
    head = itertools.takewhile(lambda line: line.startswith("#"), given.splitlines())
    docs = {doc.name: doc for doc in describe()}
    written = dict(_written(yaml.compose(given), given, docs))
    text = [*head, "#", *_comment(f"{origin} {_HOW}", "")]
    above: list[str] = []
    for doc in docs.values():
        *sections, _ = doc.name.split(".")
        text += [""] if sections[:1] != above[:1] or not sections else []
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                path = ".".join(sections[: depth + 1])
                used = any(name.startswith(f"{path}.") for name in written)
                text.append(f"{'' if used else '#'}{'  ' * depth}{section}:")
        above = sections
        text += _field(doc, written.get(doc.name), "  " * len(sections))
    return "\n".join(text) + "\n"


def _field(doc: FieldDoc, written: list[str] | None, indent: str) -> list[str]:
    """A field under its sentence: as ``written``, or commented out with its default."""
    name = doc.name.rpartition(".")[2]
    embedded = "" if doc.embedded == doc.default else f" With the embedded student: {_plain(doc.embedded)}."
    sentence = _comment(doc.text + embedded, indent)
    if written is None:
        return [*sentence, f"#{indent}{name}: {_plain(doc.default)}"]
    value, *below = written
    return [*sentence, f"{indent}{name}:{value and ' '}{value}", *(f"{indent}  {line}" for line in below)]


def _written(node: yaml.Node, given: str, docs: Collection[str], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every field that the file ``given`` sets below ``node``, with the text of its value: what stands behind the colon
    with the comment there, and the lines below."""
    lines = given.splitlines()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name not in docs:
            yield from _written(value, given, docs, f"{name}.")
        elif getattr(value, "flow_style", None) is False:  # a block: its lines, with the comments in them
            block = lines[value.start_mark.line : value.end_mark.line]
            while block and (not block[-1].strip() or block[-1].startswith("#")):
                block.pop()
            yield name, ["", *textwrap.dedent("\n".join(block)).splitlines()]
        else:
            start, end = value.start_mark, value.end_mark
            rest = lines[end.line][end.column :]
            yield name, [given[start.index : end.index] + (rest if rest.lstrip().startswith("#") else "")]


def _plain(value: Any) -> str:
    """A value on one line, as a YAML file has it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf")).split("\n")[0]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
