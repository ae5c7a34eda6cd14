"""Why a run waits: which room blocks it, since when, on whom, and why that may take long."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import psutil

from opd_ray.status.state import FAR_EVERY_S, STALE_S, CallStatus, Phase, Place, RoomStatus, Status

_GENERATORS = ("generate", "teacher_generate")
_NO_SCORERS = (*_GENERATORS, "learn", "record")
_OF_ROLLOUTS = ("generate", "score", "select", "measure")
"""Methods that make or look at rollouts."""
_OF_WEIGHTS = ("drain", "update_weights", "connect", "send_weights", "open_transport")
"""Methods that take part in a broadcast."""
_OF_RECORDS = ("write", "snapshot")
"""Methods that note what a step was."""
_MOST_GROUPS = 5
"""Groups of slots that are listed."""
_SLOW: dict[str, str] = {
    "generate": "it ends with its longest response",
    "train_step": "a step ends with its slowest rank",
    "update_weights": "a broadcast ends with its slowest member",
    "send_weights": "a broadcast ends with its slowest member",
}
"""Why a call may take long."""
_STALL_S = 60.0


class StallWatch:
    """Says why a run waits, whenever nothing moved for another minute."""

    def __init__(self) -> None:
        self._seen: tuple[object, ...] | None = None
        self._since = 0.0

    def look(self, now: float, status: Status) -> str | None:
        """``now`` in seconds of a clock that never goes back. A new step, phase, weight version or, while it
        evaluates, answer is a movement."""
        answers = sum(room.calls_done for room in status.rooms) if status.phase == "evaluating" else 0
        seen = (status.phase, status.step, status.version, answers)
        if seen != self._seen:
            self._seen, self._since = seen, now
        if status.ended or now - self._since < _STALL_S:
            return None
        self._since = now
        return explain(status)


def explain(status: Status) -> str:
    """One or two sentences: what the run waits for, and the room that is about to end it if there is one."""
    saved = status.checkpoint_step
    words = {
        "source": "the start" if saved is None else f"the checkpoint of step {saved}",
        "newest": "none is complete yet" if saved is None else f"newest: step {saved}",
        "ending": f": {status.note}" if status.note else "",
    }
    reason, named = _reason(status)
    sentence = _HEADS[status.phase].format(**words, **vars(status)) + reason
    below = [room for room in status.rooms if room.below_min_s is not None and room not in named]
    if status.ended or not below:
        return sentence
    return f"{sentence}. And {_shortage(max(below, key=lambda room: room.below_min_s or 0.0), status)}"


def driver_alive(status: Status) -> bool | None:
    """Does the driver's process run? None on another machine, where that cannot be seen."""
    if status.host != socket.gethostname():
        return None
    return process_alive(status.pid, status.time)


def process_alive(pid: int, wrote_at: float) -> bool:
    """Does the process of this machine that wrote something at that time still run?"""
    try:
        process = psutil.Process(pid)
        # A process that began later has only got the same number.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= wrote_at
    except psutil.NoSuchProcess:
        return False


def silence(status: Status, where: str | Path, now: float, alive: bool | None) -> str | None:
    """What it means that the file is old, or that its writer is gone; None where all is well. ``where``: the run
    directory, or the URI of the run's checkpoints. ``now`` in seconds since the epoch, ``alive`` of driver_alive."""
    age, far = max(0.0, now - status.time), "://" in str(where)
    if status.ended or (alive is not False and age < STALE_S + far * FAR_EVERY_S):
        return None
    resume = "submit it again with --resume" if far else f"resume with opd-ray train --run-dir {where} --resume"
    written = f"the driver has not written for {age:.0f} s"
    if alive is None:
        return f"{written}: it died, or its node {status.host} is gone; {resume}"
    if not alive:
        return f"{written}: its process {status.pid} is gone; {resume}"
    return f"{written}: its process {status.pid} is there, but stopped or stuck; see its log"


_HEADS: dict[Phase, str] = {
    "starting": "starting since {phase_since_s:.0f} s",
    "restoring": "going back to {source} since {phase_since_s:.0f} s",
    "evaluating": "evaluating the weights of version {version} since {phase_since_s:.0f} s",
    "waiting for rollouts": "learner waits {phase_since_s:.0f} s for step {step}",
    "training": "the learner is at step {step} since {phase_since_s:.0f} s",
    "broadcasting": "new weights are being broadcast since {phase_since_s:.0f} s",
    "recording": "step {step} is being recorded since {phase_since_s:.0f} s (metrics, rollout log, snapshot)",
    "saving": "a checkpoint of step {step} is being written since {phase_since_s:.0f} s ({newest})",
    "exporting": "the student is being exported since {phase_since_s:.0f} s",
    "done": "done: {step} of {steps} steps{ending}",
    "stopped": "stopped after {step} of {steps} steps{ending}",
    "failed": "failed after {step} of {steps} steps{ending}",
}
"""How the explanation of each phase begins."""
_Reason = tuple[str, Sequence[RoomStatus]]
"""How it goes on, and the rooms that it names as short of workers."""
_Culprit = tuple[RoomStatus, CallStatus | None]
"""A room that is waited for, and its oldest call of the kind that is waited for, if one is at a worker."""


def _reason(status: Status) -> _Reason:
    rooms = status.rooms
    match status.phase:
        case "starting":
            return _coming_up(status, "the rooms are up and are being connected")
        case "restoring":
            return _coming_up(status, "the rooms are up and take in their state")
        case "evaluating":
            return _on_rollouts(status, rooms)
        case "waiting for rollouts":
            return _waiting(status)
        case "training" | "saving" | "exporting":
            return _blame(_of_learner(rooms)), ()
        case "broadcasting":  # the learner's call lasts until the last receiver has answered, so receivers come first
            receivers = [room for room in rooms if room.room != "learn"]
            return _blame(_oldest(receivers, _OF_WEIGHTS) or _oldest(rooms, _OF_WEIGHTS)), ()
        case "recording":
            return _blame(_oldest(rooms, _OF_RECORDS)), ()
    return "", ()


def _coming_up(status: Status, then: str) -> _Reason:
    short = [room for room in status.rooms if room.ready < room.minimum]
    if not short:
        return f": {then}{_blame(_of_learner(status.rooms) or _oldest(status.rooms))}", ()
    missing = "; ".join(_shortage(room, status) for room in short)
    return f": {missing} (a worker waits for a place in the cluster, then loads its model)", short


def _waiting(status: Status) -> _Reason:
    places = _places(status)
    if not places:
        rest, named = _on_rollouts(status, [room for room in status.rooms if room.room not in _GENERATORS])
        return f": its golden rollouts are not scored yet{rest}", named
    head = f": {', '.join(_where(slots, place) for place, slots in places.items())}"
    if list(places) == ["not admitted"]:
        return f"{head}; {status.slots_taken} of {status.num_slots} slots are taken", ()
    generators = [room for room in status.rooms if room.room in _GENERATORS and "generate" in places]
    scorers = [room for room in status.rooms if room.room not in _NO_SCORERS and "score" in places]
    blamed = [*generators, *scorers]
    generating, scoring = _oldest(generators, _OF_ROLLOUTS), _oldest(scorers, _OF_ROLLOUTS)
    if generating and scoring and not any(map(_is_empty, blamed)):
        # Whatever is scored was generated before: scorers hold the step up where their calls are older than those of
        # generators, or where they have a queue with most of the step in it.
        queue = scoring[0].num_calls > scoring[0].ready and len(places["score"]) > len(places["generate"])
        blamed = scorers if _age(scoring) > _age(generating) or queue else generators
    rest, named = _on_rollouts(status, blamed)
    return head + rest, named


def _on_rollouts(status: Status, rooms: Sequence[RoomStatus]) -> _Reason:
    """Names the one of ``rooms`` that has calls but no worker, or else the oldest call about rollouts."""
    if empty := [room for room in rooms if _is_empty(room)]:
        return f"; {_shortage(empty[0], status)}", empty[:1]
    return _blame(_oldest(rooms, _OF_ROLLOUTS)), ()


def _is_empty(room: RoomStatus) -> bool:
    return room.ready == 0 and room.num_calls > 0


def _shortage(room: RoomStatus, status: Status) -> str:
    since = f" since {room.below_min_s:.0f} s" if room.below_min_s is not None else ""
    text = f"room {room.room} has {room.ready} of at least {_count(room.minimum, 'worker')}{since}"
    if room.spawning:
        oldest, more = room.spawning[0], f" and {room.starting - 1} more" if room.starting > 1 else ""
        text += f", {oldest.member}{more} {oldest.method} since {oldest.since_s:.0f} s ({oldest.node})"
    else:
        text += f", {room.starting or 'none'} starting"
    if room.last_loss:
        text += f"; it lost one: {room.last_loss}"
    if room.below_min_s is not None and status.below_min_limit_s is not None:
        text += f"; the run ends at {status.below_min_limit_s:.0f} s"
    return text


def _places(status: Status) -> dict[Place, list[int]]:
    """The slots that the learner waits for, by where they are."""
    places: dict[Place, list[int]] = {}
    for slot in sorted(status.missing_slots):
        places.setdefault(status.slots_at.get(slot, "not admitted"), []).append(slot)
    return places


def _where(slots: Sequence[int], place: Place) -> str:
    runs = groupby(enumerate(slots), key=lambda each: each[1] - each[0])  # the same within a run of numbers
    groups = [[slot for _, slot in run] for _, run in runs]
    shown = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups[:_MOST_GROUPS]]
    more = "" if len(groups) <= _MOST_GROUPS else f", … ({len(slots)} in all)"
    verb = "slot {} is" if len(slots) == 1 else "slots {} are"
    return f"{verb.format(', '.join(shown) + more)} {'at ' if place != 'not admitted' else ''}{place}"


def _of_learner(rooms: Iterable[RoomStatus]) -> _Culprit | None:
    return _oldest([room for room in rooms if room.room == "learn"])


def _oldest(rooms: Iterable[RoomStatus], methods: Sequence[str] = ()) -> _Culprit | None:
    """The room with the oldest call to one of ``methods``, or to any; without one at a worker, that with most calls
    that wait for a worker."""
    found: list[_Culprit] = [
        (room, next((call for call in room.calls if not methods or call.method in methods), None)) for room in rooms
    ]
    named = [(room, call) for room, call in found if call or room.waiting]
    return max(named, key=lambda each: (_age(each), each[0].waiting), default=None)


def _age(culprit: _Culprit) -> float:
    return culprit[1].since_s if culprit[1] else -1.0


def _blame(culprit: _Culprit | None) -> str:
    if culprit is None:
        return ""
    room, call = culprit
    if call is None:
        return f"; room {room.room} has {_count(room.waiting, 'call')} waiting for a worker"
    waiting = f", {room.waiting} of them waiting for one with room" if room.waiting else ""
    notes = [f"of {room.num_calls} at {_count(room.ready, 'worker')}{waiting}"] if room.num_calls > 1 else []
    if call.method in _SLOW:
        notes.append(_SLOW[call.method])
    if room.note:
        notes.append(room.note)
    if room.deadline_s is not None:
        answered = call.silent_s is not None and call.silent_s < call.since_s
        notes.append(
            f"its limit is {room.deadline_s:.0f} s"
            + (f" from its worker's last answer, {call.silent_s:.0f} s ago" if answered else "")
        )
    return (
        f"; oldest call in room {room.room}: {call.member} on {call.node}, {call.method}() since {call.since_s:.0f} s"
        + (f" ({'; '.join(notes)})" if notes else "")
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
