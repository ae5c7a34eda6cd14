"""How far something has come that takes a while before a run begins: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int | None], None]
"""What is being done, how many are done, and of how many in all, if that is known."""
T = TypeVar("T")

_LINE_EVERY_S = 10.0
_PATIENCE_S = 2.0


@contextlib.contextmanager
def terminal_progress(first_line_s: float = 0.0) -> Iterator[Report]:
    """A bar on stderr if that is a terminal, else a line after ``first_line_s``, every ten seconds and at the end."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        return
    due_s = time.monotonic() + first_line_s

    def plain(what: str, done: int, total: int | None) -> None:
        nonlocal due_s
        if time.monotonic() >= due_s or (done == total and not first_line_s):
            due_s = time.monotonic() + _LINE_EVERY_S
            print(f"{what}: {100 * done // total} %" if total else f"{what}: {done}", file=sys.stderr, flush=True)

    yield plain


def watched(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items; those who wait for longer than two seconds after the first one see how many there have been."""
    began_s, report = None, None
    with contextlib.ExitStack() as stack:
        for number, item in enumerate(items, start=1):
            yield item
            began_s = time.monotonic() if began_s is None else began_s
            if report is None and time.monotonic() - began_s > _PATIENCE_S:
                report = stack.enter_context(terminal_progress(first_line_s=_LINE_EVERY_S - _PATIENCE_S))
            if report:
                report(what, number, total)
