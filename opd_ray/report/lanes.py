"""Who did what, when: the traces of runs as lanes, one for each actor, for the page's script."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from opd_ray.report.runs import Run
from opd_ray.watch.trace_file import TRACE, read

_MOST_RUNS = 4
_MOST_LANES = 16
_MOST_SPANS = 4000
"""Of a run; the newest."""
_FIRST = ("drive", "generate", "teacher_generate")
_LAST = ("learn", "record")
"""Rooms, in the order of the way of a rollout; scorers are between the two."""
_TINY_S = 0.001
_Lane = tuple[int, int]


def traced(runs: Sequence[Run]) -> list[Run]:
    """Runs that left a trace, as many as are shown."""
    return list(islice((run for run in runs if (run.path / TRACE).is_file()), _MOST_RUNS))


def lanes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each traced run's lanes and what of them is drawn: times in seconds since the trace began."""
    return [chart for run in traced(runs) if (chart := _chart(run))]


def _chart(run: Run) -> dict[str, Any] | None:
    names: dict[_Lane, str] = {}
    rooms: dict[_Lane, str] = {}
    busy: dict[_Lane, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    ends: dict[_Lane, tuple[float, float]] = {}
    newest: deque[tuple[_Lane, str, float, float, Any]] = deque(maxlen=_MOST_SPANS * 4)
    for event in read(run.path / TRACE):
        lane = (event["pid"], event["tid"])
        if event["name"] == "thread_name":
            names[lane] = event["args"]["name"]
        elif event["ph"] == "X":
            began, lasted = event["ts"] / 1e6, event["dur"] / 1e6
            rooms[lane] = event["cat"]
            busy[lane][event["name"]] += lasted
            first, last = ends.get(lane, (began, began))
            ends[lane] = min(first, began), max(last, began + lasted)
            newest.append((lane, event["name"], began, lasted, event.get("args", {}).get("step")))
    shown = _shown(rooms)
    spans = list(islice((span for span in reversed(newest) if span[0] in shown and span[3] >= _TINY_S), _MOST_SPANS))
    if not spans:
        return None
    kinds: dict[str, list[list[float]]] = defaultdict(lambda: [[], [], [], []])
    for lane, kind, began, lasted, step in reversed(spans):
        for column, value in zip(
            kinds[kind], (shown.index(lane), round(began, 4), round(lasted, 4), step), strict=True
        ):
            column.append(value)
    whole = max(last for _, last in ends.values())
    return {
        "name": run.name,
        "since": min(span[2] for span in spans),
        "whole": whole,
        "left_out": len(rooms) - len(shown),
        "lanes": [{"name": names.get(lane, "?"), "shares": _shares(busy[lane], ends[lane])} for lane in shown],
        "kinds": dict(kinds),
    }


def _shown(rooms: dict[_Lane, str]) -> list[_Lane]:
    """The first of every room, the second of every room, ... as many as there is space for; in order."""
    found: dict[str, list[_Lane]] = defaultdict(list)
    for lane, room in sorted(rooms.items()):
        found[room].append(lane)
    chosen = sorted((at, _place(room), room) for room, lanes in found.items() for at in range(len(lanes)))[:_MOST_LANES]
    return [found[room][at] for _, room, at in sorted((place, room, at) for at, place, room in chosen)]


def _place(room: str) -> int:
    order = [*_FIRST, "", *_LAST]
    return order.index(room if room in order else "")


def _shares(busy: dict[str, float], ends: tuple[float, float]) -> list[tuple[str, float]]:
    """Of a lane's time, the longest first; what is left is idle."""
    there = max(ends[1] - ends[0], 1e-9)
    shares = [(kind, round(min(1.0, lasted / there), 4)) for kind, lasted in busy.items()]
    return sorted(shares, key=lambda share: -share[1])
