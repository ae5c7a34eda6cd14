"""What happens in a run besides its steps, from its start to its end: one JSON object in events.jsonl, and for most of
it a line on the console."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Events:
    """What happens in the driver besides steps: its start and end, a checkpoint, a death, a word of the guard.

    Each is one JSON object in ``path``, which earlier starts of the run began.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, kind: str, text: str, **fields: Any) -> None:
        """Tells people as well: one line on the console; the rest as ``note``."""
        print(text, flush=True)
        self.note(kind, text, **fields)

    def note(self, kind: str, text: str, *, step: int | None = None, version: int | None = None, **fields: Any) -> None:
        """``kind`` is one word to count by, ``text`` one sentence; ``fields`` are values that JSON knows, others are
        written as text and numbers that are not finite as null. A file that cannot be written costs no run."""
        event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "text": text,
            "step": step,
            "version": version,
            **fields,
        }
        plain = json.loads(json.dumps(event, default=str), parse_constant=lambda _: None)
        try:
            self._append(json.dumps(plain, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"{self._path} was not written ({error}): this event is only here", file=sys.stderr, flush=True)

    def _append(self, line: str) -> None:
        """At the start of a line, also behind one that a killed driver did not finish."""
        with self._path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
