"""The status: every phase is explained, the blame falls on the right room, and the file is whole or refused."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from opd_ray.errors import InputError
from opd_ray.rooms.room import Member
from opd_ray.status.reasons import StallWatch, driver_alive, explain, silence
from opd_ray.status.state import STALE_S, CallStatus, Phase, RoomStatus, Status, oldest_calls, read, write


def call(method: str, since_s: float, member: str = "worker-0", node: str = "node-a") -> CallStatus:
    return CallStatus(member, node, method, since_s)


def room(name: str, *calls: CallStatus, **changes: Any) -> RoomStatus:
    values: dict[str, Any] = {
        "ready": 1,
        "starting": 0,
        "minimum": 1,
        "maximum": 1,
        "waiting": 0,
        "calls": calls,
        "num_calls": len(calls),
        "restarts": 0,
        "last_loss": None,
        "below_min_s": None,
        "busy_share": 0.5,
    }
    return RoomStatus(room=name, **values | changes)


def status(phase: Phase = "training", *rooms: RoomStatus, **changes: Any) -> Status:
    values: dict[str, Any] = {
        "time": 1000.0,
        "pid": 4,
        "host": "head",
        "phase_since_s": 42.0,
        "step": 57,
        "steps": 100,
        "version": 57,
        "last_step_s_ago": 50.0,
        "slots_taken": 96,
        "num_slots": 96,
        "buffered_slots": 20,
        "missing_slots": (),
        "slots_at": {},
        "checkpoint_step": 50,
        "below_min_limit_s": 900.0,
    }
    return Status(phase=phase, rooms=rooms, **values | changes)


def missing(**places: Any) -> dict[str, Any]:
    """generate=range(...), score=range(...): what the learner waits for."""
    at = {slot: place for place, slots in places.items() for slot in slots}
    return {"missing_slots": tuple(at), "slots_at": at}


def assert_says(text: str, *parts: str) -> None:
    """All parts, in this order."""
    position = 0
    for part in parts:
        assert part in text[position:], f"{part!r} is missing (or comes too early) in: {text}"
        position = text.index(part, position) + len(part)


def test_a_learner_that_waits_for_a_generator() -> None:
    generate = room(
        "generate",
        call("generate", 40, "student-generator-0", "node-x"),
        call("generate", 9, "student-generator-1"),
        ready=2,
        deadline_s=1800.0,
    )
    text = explain(status("waiting for rollouts", generate, room("teacher"), **missing(generate=range(1824, 1832))))
    assert text == (
        "learner waits 42 s for step 57: slots 1824–1831 are at generate; oldest call in room generate: "
        "student-generator-0 on node-x, generate() since 40 s (of 2 at 2 workers; it ends with its longest response; "
        "its limit is 1800 s)"
    )


def test_a_limit_counts_from_the_worker_s_last_answer() -> None:
    """The bug: the limit was told as that of the oldest call, as if its time in a queue counted."""
    behind = dataclasses.replace(call("score", 70, "teacher-scorer-0"), silent_s=12.0)
    teacher = room("teacher", behind, ready=16, num_calls=256, waiting=224, deadline_s=600.0)
    text = explain(status("waiting for rollouts", teacher, **missing(score=[7])))
    assert_says(text, "score() since 70 s (of 256 at 16 workers, 224 of them waiting for one with room; ")
    assert text.endswith("; its limit is 600 s from its worker's last answer, 12 s ago)")


def test_a_learner_that_waits_for_the_slower_scorer() -> None:
    rooms = (
        room("generate", call("generate", 60)),  # for a later step
        room("teacher", call("score", 3, "teacher-scorer-0")),
        room("reference", call("score", 31, "reference-scorer-0"), call("score", 12), num_calls=7),
    )
    text = explain(status("waiting for rollouts", *rooms, **missing(score=[7, 9, 10])))
    assert_says(
        text, "slots 7, 9–10 are at score", "room reference", "reference-scorer-0", "score() since 31 s", "of 7"
    )
    assert "room generate" not in text


@pytest.mark.parametrize(
    ("generating_s", "scoring_s", "queue", "num_generate", "num_score", "blamed"),
    [
        (40, 2, 1, 8, 8, "generate"),  # scorers keep pace
        (40, 2, 9, 8, 3, "generate"),  # a queue, but most of the step isn't there yet
        (40, 20, 9, 3, 8, "teacher"),  # scorers have a queue with most of the step in it
        (10, 25, 1, 8, 1, "teacher"),  # a call to a scorer that is older than any to a generator
    ],
)
def test_blame_between_generators_and_scorers(
    generating_s: float, scoring_s: float, queue: int, num_generate: int, num_score: int, blamed: str
) -> None:
    rooms = (
        room("generate", call("generate", generating_s)),
        room("teacher", call("score", scoring_s), num_calls=queue),
    )
    places = missing(generate=range(num_generate), score=range(20, 20 + num_score))
    text = explain(status("waiting for rollouts", *rooms, **places))
    assert_says(text, "at generate", "at score", f"oldest call in room {blamed}")


def test_a_worker_that_loads_its_model_is_not_said_to_have_no_place() -> None:
    """The bug: of one that was placed and imported vLLM for half a minute it said "not placed yet"."""
    member = Member(None, "student-generator-0")
    assert member.whereabouts == "not placed yet"
    member.placed_on = "node-x (10.0.0.2)"
    assert member.whereabouts == "placed on node-x (10.0.0.2), loading"
    member.node = "node-x (10.0.0.2)"
    assert member.whereabouts == "node-x (10.0.0.2)"


def test_a_room_without_workers_is_blamed_before_any_call() -> None:
    spawning = (call("starting", 128, "student-generator-2", "not placed yet"),)
    generate = room(
        "generate",
        ready=0,
        starting=1,
        waiting=3,
        num_calls=3,
        below_min_s=130.0,
        spawning=spawning,
        last_loss="student-generator-0 on node-x: the actor died",
    )
    teacher = room("teacher", call("score", 300))
    text = explain(status("waiting for rollouts", generate, teacher, **missing(generate=[3], score=[4])))
    assert_says(
        text,
        "learner waits 42 s for step 57",
        "slot 3 is at generate, slot 4 is at score",
        "room generate has 0 of at least 1 worker since 130 s",
        "student-generator-2 starting since 128 s (not placed yet)",
        "the actor died",
        "the run ends at 900 s",
    )
    assert "teacher" not in text
    assert text.count("room generate") == 1

    empty = room("teacher", ready=0, num_calls=2, waiting=2, below_min_s=20.0)
    busy = room("generate", call("generate", 300))
    text = explain(status("waiting for rollouts", busy, empty, **missing(generate=range(8), score=[9])))
    assert_says(text, "room teacher has 0 of at least 1 worker since 20 s, none starting", "the run ends at 900 s")


def test_an_idle_room_without_workers_does_not_hold_up_the_step() -> None:
    """Slots are at generate only: the scorers' shortage is told besides, not blamed."""
    rooms = (room("generate", call("generate", 30)), room("teacher", ready=0, below_min_s=70.0))
    text = explain(status("waiting for rollouts", *rooms, **missing(generate=[3])))
    assert_says(text, "oldest call in room generate", ". And room teacher has 0 of at least 1 worker since 70 s")


def test_slots_that_are_not_admitted_and_golden_rollouts() -> None:
    generate = room("generate", call("generate", 30))
    text = explain(status("waiting for rollouts", generate, missing_slots=(5, 6), slots_at={5: "not admitted"}))
    assert_says(text, "slots 5–6 are not admitted", "96 of 96 slots are taken")
    rooms = (generate, room("teacher", call("score", 5, "teacher-scorer-0")))
    text = explain(status("waiting for rollouts", *rooms))
    assert_says(text, "golden rollouts", "teacher-scorer-0", "since 5 s")


def test_many_separate_slots_are_not_all_listed() -> None:
    text = explain(status("waiting for rollouts", **missing(score=range(0, 40, 2))))
    assert_says(text, "slots 0, 2, 4, 6, 8, … (20 in all) are at score")


def test_training_names_the_rank() -> None:
    rooms = (room("generate", call("generate", 99)), room("learn", call("train_step", 41, "learner-1", "node-b")))
    text = explain(status("training", *rooms))
    assert_says(text, "the learner is at step 57 since 42 s", "learner-1 on node-b, train_step() since 41 s", "slowest")


def test_a_broadcast_names_the_member_that_has_not_answered() -> None:
    rooms = (
        room(
            "generate", call("generate", 99, "student-generator-0"), call("update_weights", 42, "student-generator-1")
        ),
        room("learn", call("send_weights", 42.1, "learner-0")),
        room("teacher", call("node", 500)),  # a replacement on its way up
    )
    text = explain(status("broadcasting", *rooms))
    assert_says(
        text, "new weights are being broadcast since 42 s", "student-generator-1", "update_weights() since 42 s"
    )
    assert "learner-0" in explain(status("broadcasting", rooms[1], rooms[2]))


def test_what_is_done_after_a_step_is_not_taken_for_its_broadcast() -> None:
    """The bug: while the rollout log or a snapshot held the run up, the status spoke of a broadcast."""
    rooms = (room("learn", call("snapshot", 40, "learner-0")), room("generate", call("generate", 99)), room("record"))
    assert_says(explain(status("recording", *rooms)), "step 57 is being recorded since 42 s", "learner-0", "snapshot()")
    rooms = (room("learn"), room("generate", call("generate", 99)), room("record", call("write", 41, "recorder-0")))
    assert_says(explain(status("recording", *rooms)), "recorder-0", "write() since 41 s")


def test_saving_restoring_and_exporting() -> None:
    learn = room("learn", call("snapshot", 40, "learner-0", "node-b"))
    assert_says(explain(status("saving", learn)), "checkpoint of step 57", "42 s", "step 50", "learner-0 on node-b")
    assert "none is complete yet" in explain(status("saving", checkpoint_step=None))
    assert_says(explain(status("exporting", learn)), "the student is being exported since 42 s", "learner-0")
    down = room("learn", ready=0, starting=2, minimum=2, spawning=(call("starting", 9, "learner-0"),))
    text = explain(status("restoring", down))
    assert_says(
        text, "checkpoint of step 50 since 42 s", "room learn has 0 of at least 2 workers", "learner-0 and 1 more"
    )
    text = explain(status("restoring", room("learn", call("restore", 8)), checkpoint_step=None))
    assert_says(text, "going back to the start", "restore() since 8 s")


def test_starting_lists_the_rooms_that_are_not_up() -> None:
    rooms = (
        room("generate", ready=0, starting=2, minimum=2, below_min_s=42.0),
        room("teacher", ready=0, starting=1, spawning=(call("starting", 40, "teacher-scorer-0"),)),
        room("reference"),
    )
    text = explain(status("starting", *rooms, step=0))
    assert_says(text, "starting since 42 s", "room generate has 0 of at least 2", "room teacher", "teacher-scorer-0")
    assert "reference" not in text
    assert text.count("room generate") == 1
    up = (room("learn", call("begin", 12, "learner-0")), room("generate"))
    assert_says(explain(status("starting", *up)), "the rooms are up", "learner-0", "begin() since 12 s")


def test_evaluating_names_the_oldest_answer() -> None:
    rooms = (room("generate", call("generate", 33, "student-generator-1")), room("learn"))
    assert_says(explain(status("evaluating", *rooms)), "version 57 since 42 s", "student-generator-1", "33 s")


def test_the_end_says_how_it_ended() -> None:
    assert explain(status("done", step=100)) == "done: 100 of 100 steps"
    below = room("generate", ready=0, below_min_s=901.0)
    text = explain(status("failed", below, note="generate: below its minimum for 900 s"))
    assert text == "failed after 57 of 100 steps: generate: below its minimum for 900 s"


@pytest.mark.parametrize("phase", get_args(Phase))
def test_every_phase_has_an_explanation_even_if_nothing_is_known(phase: Phase) -> None:
    text = explain(status(phase, missing_slots=(1,)))
    assert text and "\n" not in text


def test_the_oldest_call_of_every_method_is_listed() -> None:
    calls = [call("generate", 100.0 - i) for i in range(9)] + [call("update_weights", 3), call("update_weights", 2)]
    listed = oldest_calls(calls)
    assert [(each.method, each.since_s) for each in listed] == [
        ("generate", 100),
        ("generate", 99),
        ("generate", 98),
        ("generate", 97),
        ("update_weights", 3),
    ]
    assert oldest_calls([]) == ()


def test_the_stall_watch_speaks_each_time_that_nothing_moved() -> None:
    watch, now = StallWatch(), status("training")
    assert [watch.look(time, now) is not None for time in (0, 59, 60, 119, 120)] == [False, False, True, False, True]
    for moved in (
        status("broadcasting"),
        status("broadcasting", step=58),
        status("broadcasting", step=58, version=58),
        status("evaluating", room("generate", calls_done=3), step=58),
        status("evaluating", room("generate", calls_done=4), step=58),
    ):
        assert watch.look(179, moved) is None
    # Rollouts that come in while the learner waits don't make it move.
    waiting = [status("waiting for rollouts", room("generate", calls_done=done)) for done in range(4)]
    assert [watch.look(200 + 30 * i, each) is not None for i, each in enumerate(waiting)] == [False, False, True, False]
    assert watch.look(10_000, status("done")) is None
    assert watch.look(20_000, status("done")) is None


def test_a_status_survives_the_file(tmp_path: Path) -> None:
    rooms = (room("generate", call("generate", 1.5), spawning=(call("joining", 2),), below_min_s=3.0), room("learn"))
    for each in (
        status("training", *rooms, **missing(score=[1, 2])),
        status("failed", note="why", last_step_s_ago=None),
    ):
        write(tmp_path / "status.json", each)
        assert read(tmp_path / "status.json") == each
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ("", "JSON"), ('{"time": 1', "JSON"), ("{}", "time"), ("[]", "status"), ("\xff", "JSON")],
)
def test_a_file_that_is_no_status_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"status\.json") as caught:
        read(path)
    assert words in str(caught.value) or "cannot be read" in str(caught.value)


def test_a_directory_in_place_of_the_file_and_a_field_of_another_type_are_refused(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "status.json")
    other = tmp_path / "other.json"
    write(other, dataclasses.replace(status(), phase="sleeping"))
    with pytest.raises(InputError, match="phase"):
        read(other)


def test_whether_the_driver_lives() -> None:
    here = {"host": socket.gethostname(), "time": 4e9}
    assert driver_alive(status(**here, pid=os.getpid())) is True
    assert driver_alive(status(host=socket.gethostname(), pid=os.getpid(), time=1.0)) is False  # began after it wrote
    assert driver_alive(status(host="elsewhere", pid=os.getpid())) is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert driver_alive(status(**here, pid=ended.pid)) is False


def test_what_silence_means(tmp_path: Path) -> None:
    run_dir = Path("runs/a")
    now = status()
    assert silence(now, run_dir, now.time + STALE_S - 1, None) is None
    assert silence(now, run_dir, now.time - 5, True) is None  # clocks differ
    text = silence(now, run_dir, now.time + 95, None)
    assert text is not None
    assert_says(text, "95 s", "died, or its node head is gone", "opd-ray train --run-dir runs/a --resume")
    assert "process 4 is gone" in str(silence(now, run_dir, now.time + 1, False))
    assert silence(now, "s3://bucket/a", now.time + STALE_S + 5, None) is None, "it comes there less often"
    assert str(silence(now, "s3://bucket/a", now.time + 95, None)).endswith("submit it again with --resume")
    assert "stopped or stuck" in str(silence(now, run_dir, now.time + 95, True))
    assert silence(status("done"), run_dir, now.time + 9999, False) is None
