"""The file of a trace: Chrome's Trace Event Format, a JSON array, an event a line, whose end may be missing.

It is bounded: a file that is full becomes ``trace-before.json``, in the place of an earlier one.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from opd_ray.messages import Span

TRACE, BEFORE = "trace.json", "trace-before.json"
"""Names of the files in the run directory: the newest events, and those before them."""
DRIVER = "driver"
"""The lane of the phases."""
_MOST_BYTES = 32 << 20
"""Of each of the two files."""
_GAP_US = 0.002
"""Perfetto leaves out what overlaps what came before by a nanosecond, as rounding would have it."""
_MOST_WAITING = 100_000
"""Events that wait to be written; where the disk takes none the oldest are dropped."""


class TraceFile:
    """Events, in memory until ``flush``; a process for each node, a thread for each lane of it."""

    def __init__(self, run_dir: Path, zero: float, most_bytes: int = _MOST_BYTES) -> None:
        """``zero``: when the trace begins, of the clock that all times are of. What an earlier start of the run wrote
        is what was before."""
        self._path, self._before, self._zero, self._most = run_dir / TRACE, run_dir / BEFORE, zero, most_bytes
        self._size = 0
        self._nodes: dict[str, int] = {}
        self._lanes: dict[tuple[str, str], int] = {}
        self._names: list[Mapping[str, Any]] = []
        """Events that say what processes and threads are called: each file begins with them."""
        self._told: dict[str, float] = {}
        self._new: deque[Mapping[str, Any]] = deque(maxlen=_MOST_WAITING)
        self._file: TextIO | None = None

    def span(self, node: str, lane: str, room: str, span: Span) -> None:
        began, end = self._us(span.began_s), self._us(span.began_s + span.lasted_s)
        event = {"ph": "X", "name": span.kind, "cat": room, "ts": began}
        event |= {"dur": max(0.0, round(end - began - _GAP_US, 3)), **self._at(node, lane)}
        self._new.append({**event, "args": span.facts} if span.facts else event)

    def mark(self, node: str, lane: str, kind: str, text: str, at: float) -> None:
        event = {"ph": "i", "s": "g", "name": kind, "cat": "event", "ts": self._us(at), **self._at(node, lane)}
        self._new.append({**event, "args": {"text": text}})

    def flush(self, errors: Mapping[str, float] | None = None) -> None:
        """Writes what is new; ``errors``: seconds by which nodes' clocks may be off. Raises OSError."""
        for node, error in (errors or {}).items():
            if node in self._nodes and error < 0.5 * self._told.get(node, float("inf")):
                self._told[node] = error
                self._name("process_labels", self._nodes[node], 0, labels=f"clock ± {error * 1e3:.1f} ms")
        while self._new:
            self._write(self._new.popleft())
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Raises OSError."""
        self.flush()
        self._end()

    def _at(self, node: str, lane: str) -> dict[str, int]:
        if node not in self._nodes:
            self._nodes[node] = len(self._nodes) + 1
            self._name("process_name", self._nodes[node], 0, name=node)
        if (node, lane) not in self._lanes:
            self._lanes[node, lane] = len(self._lanes) + 1
            self._name("thread_name", self._nodes[node], self._lanes[node, lane], name=lane)
        return {"pid": self._nodes[node], "tid": self._lanes[node, lane]}

    def _name(self, what: str, pid: int, tid: int, **args: str) -> None:
        self._new.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args})

    def _us(self, at: float) -> float:
        return round((at - self._zero) * 1e6, 3)

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._file is not None and self._size > self._most:
            self._end()
        if self._file is None:
            if self._path.exists():
                self._path.replace(self._before)
            self._file = self._path.open("w", encoding="utf-8")
            self._size = self._file.write("[\n" + ",\n".join(map(_line, [*self._names, event])))
        else:
            self._size += self._file.write(",\n" + _line(event))
        if event["ph"] == "M":
            self._names.append(event)

    def _end(self) -> None:
        if self._file is not None:
            self._file.write("\n]\n")
            self._file.close()
            self._file = None


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace, also of one whose end is missing or is being written."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    yield json.loads(line.rstrip(",\n"))
