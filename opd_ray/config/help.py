"""What the command line takes: names of files, and the fields of a configuration as --help prints them: all that a verb
reads, or those of one section."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import click

from opd_ray.config.loading import FieldDoc, describe, describe_absent
from opd_ray.errors import near

EVALUATES = ("student", "data", "rollout", "evaluation", "metrics", "env", "deadlines")
"""What an evaluation reads, where nothing is trained."""


class FilePath(click.Path):
    """One that a file may have: what else asks for it would end with a traceback. ``~`` is the user's home, which
    shells put in only at the start of a word."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        value = os.path.expanduser(value)
        if not value or value.startswith("~"):
            self.fail("is an empty name" if not value else f"{value!r}: there is no such home", param, ctx)
        try:
            os.lstat(value)
        except (OSError, ValueError) as error:  # ENAMETOOLONG; a null byte
            if getattr(error, "errno", errno.EINVAL) in (errno.ENAMETOOLONG, errno.EINVAL):
                self.fail(f"{os.fspath(value)[:60]!r}: {getattr(error, 'strerror', None) or error}", param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(FilePath):
    """One that is written when the work is done, which may have taken hours: that it cannot be is told before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if not path.exists() and not os.access(path.parent, os.W_OK):
            self.fail(f"{path}: there is no directory {path.parent} that can be written to; make it first", param, ctx)
        return path


class ConfiguredCommand(click.Command):
    """A command whose --help ends with the configuration fields that it reads: their sentences, choices and defaults;
    ``--help SECTION`` prints a section's alone."""

    def __init__(self, *args: Any, sections: Collection[str] | None = None, **more: Any) -> None:
        """``sections``: of them alone, and the fields at the top level; by default all."""
        super().__init__(*args, **more)
        self._sections = sections
        self.params.append(
            click.Option(
                ["-h", "--help"],
                is_flag=False,
                flag_value="",
                metavar="[SECTION]",
                is_eager=True,
                expose_value=False,
                callback=self._show,
                help="Show this and exit; of a SECTION, as learner or loss.student, its fields alone.",
            )
        )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write(formatter, self._fields())

    def _fields(self) -> list[FieldDoc]:
        every = [*describe(), *describe_absent()]
        kept = self._sections
        return [doc for doc in every if kept is None or "." not in doc.name or doc.name.partition(".")[0] in kept]

    def _show(self, ctx: click.Context, _: click.Parameter, asked: str | None) -> None:
        if asked is None or ctx.resilient_parsing:
            return
        if not asked:
            click.echo(ctx.get_help())
            ctx.exit()
        name, fields = asked.partition("=")[0], self._fields()
        docs = [doc for doc in fields if doc.name == name or doc.name.startswith(f"{name}.")]
        if not docs:
            names = {".".join(doc.name.split(".")[: name.count(".") + 1]) for doc in fields}
            raise click.BadParameter(f"there is no section '{name}'{near(name, names)}", ctx, param_hint="--help")
        formatter = ctx.make_formatter()
        _write(formatter, docs)
        click.echo(formatter.getvalue().strip("\n"))
        ctx.exit()


def _write(formatter: click.HelpFormatter, docs: Iterable[FieldDoc]) -> None:
    for section, each in itertools.groupby(docs, key=lambda doc: doc.name.rpartition(".")[0]):
        fields = list(each)
        with formatter.section(f"Fields of {section}" if section else "Fields at the top level"):
            if section:
                formatter.write_text(" ".join(fields[0].section.split()))
            formatter.write_dl([(doc.name, f"{doc.text} [{_default(doc)}]") for doc in fields], col_max=34)


def _default(doc: FieldDoc) -> str:
    default, embedded = (json.dumps(value, ensure_ascii=False) for value in (doc.default, doc.embedded))
    return default if embedded == default else f"{default}; {embedded} with the embedded student"
