"""The trace: what a worker keeps, clocks of nodes, the file's format and size, and whole runs on fake workers."""

import asyncio
import json
import threading
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import pytest

from driven_run import cast_of, die, drive, events, in_no_hurry, on_call
from opd_ray.messages import Span
from opd_ray.rooms import spans
from opd_ray.watch.trace import Clock, Trace
from opd_ray.watch.trace_file import BEFORE, TRACE, TraceFile, read

# ---- what a worker keeps ----


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved, and a worker that has kept nothing."""
    now = [100.0]
    monkeypatch.setattr("opd_ray.rooms.spans.time.monotonic", lambda: now[0])
    monkeypatch.setattr(spans, "_awake_until", 0.0)
    monkeypatch.setattr(spans, "_here", threading.local())
    spans._kept.clear()
    return now


def work(clock, kind, seconds, **facts):
    with spans.span(kind, **facts):
        clock[0] += seconds


def test_nothing_is_kept_unless_somebody_has_asked_within_a_minute(clock):
    work(clock, "train", 1)
    assert spans.collect().spans == ()
    work(clock, "train", 1)
    clock[0] += 59
    work(clock, "train", 1)
    assert spans.collect() == spans.Spans(162.0, (Span("train", 101, 1, {}),))


def test_what_goes_on_is_one_span_and_what_begins_within_cuts_the_one_around(clock):
    spans.collect()
    for _ in range(3):
        work(clock, "generate", 0.01)
        clock[0] += 0.004
    clock[0] += 0.01
    with spans.span("broadcast", version=4):
        clock[0] += 1
        for _ in range(2):
            work(clock, "gather", 2)
            clock[0] += 3
    kept = [(span.kind, round(span.lasted_s, 3)) for span in spans.collect().spans]
    assert kept == [
        ("generate", 0.038),
        ("broadcast", 1),
        ("gather", 2),
        ("broadcast", 3),
        ("gather", 2),
        ("broadcast", 3),
    ]


def test_a_worker_that_is_not_asked_keeps_the_newest(clock, monkeypatch):
    spans.collect()
    for number in range(spans._MOST + 5):
        work(clock, "score", 0.001, rollouts=number)
    kept = spans.collect().spans
    assert (len(kept), kept[0].facts) == (spans._MOST, {"rollouts": 5})


@pytest.mark.parametrize("raises", [False, True])
def test_a_function_of_which_every_call_is_a_span(clock, raises):
    spans.collect()

    @spans.spanned("snapshot")
    def snapshot(self, one, two=2):
        clock[0] += one
        if raises:
            raise ValueError
        return two

    try:
        assert snapshot(None, 1, two=3) == 3
    except ValueError:
        assert raises
    assert spans.collect().spans == (Span("snapshot", 100, 1, {}),)


# ---- clocks ----


def test_the_quickest_of_the_last_answers_says_best_how_far_a_clock_is_off():
    clock = Clock(looks=3)
    clock.look(10.0, 11.0, 2.6)  # asked and answered within a second; the clock said 2.6 somewhere between
    clock.look(20.0, 20.002, 12.001)
    assert clock.ahead_s == pytest.approx(8.0) and clock.error_s == pytest.approx(0.001)
    clock.look(30.0, 40.0, 22.0)
    assert clock.ahead_s == pytest.approx(8.0)
    for later in (50.0, 60.0):  # clocks drift: what is old counts no more
        clock.look(later, later + 0.2, later - 7.9)
    assert clock.ahead_s == pytest.approx(8.0, abs=0.1) and clock.error_s == pytest.approx(0.1)


# ---- the file ----


def check_format(events):
    """Chrome's Trace Event Format, as far as it is used: complete events, instants and names; lanes are flat."""
    names, lanes = set(), defaultdict(list)
    for event in events:
        assert event["ph"] in "XiM" and isinstance(event["name"], str) and event["name"]
        assert type(event["pid"]) is int and type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "process_labels")
            assert set(event["args"]) <= {"name", "labels"} and all(map(str, event["args"].values()))
            names.add((event["name"], event["pid"], event["tid"]))
            continue
        assert ("process_name", event["pid"], 0) in names, "a node's name comes before its events"
        assert ("thread_name", event["pid"], event["tid"]) in names, "a lane's, too"
        assert event["ts"] >= 0 and isinstance(event["cat"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[event["pid"], event["tid"]].append(event)
        else:
            assert event["s"] == "g" and event["args"]["text"]
    for lane in lanes.values():
        for one, other in pairwise(sorted(lane, key=lambda event: event["ts"])):
            assert one["ts"] + one["dur"] < other["ts"], "one thing after the other"
    return lanes


def test_spans_that_follow_each_other_do_not_overlap_however_they_are_rounded(tmp_path):
    """The bug: Perfetto left out every seventeenth."""
    file, began = TraceFile(tmp_path, zero=12_345.678), 12_400.1
    for number in range(300):
        end = began + 0.0123456789 * (number % 7 + 1)
        file.span("node", "learner-0", "learn", Span("train" if number % 2 else "fetch", began, end - began, {}))
        began = end
    file.close()
    (lane,) = check_format(json.loads((tmp_path / TRACE).read_text())).values()
    assert len(lane) == 300


def test_what_is_known_later_of_a_clock_makes_no_two_spans_overlap(tmp_path):
    trace = Trace(tmp_path, SimpleNamespace(every=[]), None, since=0.0)
    member = SimpleNamespace(node="far", name="learner-0")
    for span in (Span("train", 10.0, 2.0, {}), Span("fetch", 11.9, 0.3, {}), Span("train", 12.0, 0.1, {})):
        trace._take("learn", member, span)

    async def end():
        trace.start()
        await trace.close()

    asyncio.run(end())
    (lane,) = check_format(json.loads((tmp_path / TRACE).read_text())).values()
    assert [(event["name"], round(event["dur"] / 1e6, 3)) for event in lane] == [
        ("train", 2),
        ("fetch", 0.2),
        ("train", 0),
    ]


def test_full_files_take_turns_and_each_can_be_read_alone(tmp_path):
    file = TraceFile(tmp_path, zero=1000.0, most_bytes=10_000)
    for second in range(200):
        file.span(
            f"node-{second % 2}",
            f"learner-{second % 2}",
            "learn",
            Span("train", 1000.0 + second, 0.5, {"step": second}),
        )
        file.flush()
    assert len(list(read(tmp_path / TRACE))) > 10, "it is whole also while it is written"
    file.close()
    sizes = [(tmp_path / name).stat().st_size for name in (BEFORE, TRACE)]
    assert max(sizes) < 10_300
    both = [json.loads((tmp_path / name).read_text()) for name in (BEFORE, TRACE)]
    steps = []
    for content in both:
        check_format(content)
        steps += [event["args"]["step"] for event in content if event["ph"] == "X"]
    assert steps == list(range(200))[-len(steps) :] and len(steps) > 100
    assert both[1][-1]["ts"] == 199e6


def test_a_resumed_run_keeps_the_trace_of_the_start_before(tmp_path):
    for zero in (0.0, 50.0):
        file = TraceFile(tmp_path, zero)
        file.mark("node", "driver", "start", f"at {zero}", zero + 1)
        file.flush()  # and is killed
    texts = [
        [event["args"]["text"] for event in read(tmp_path / name) if event["ph"] == "i"] for name in (BEFORE, TRACE)
    ]
    assert texts == [["at 0.0"], ["at 50.0"]]


# ---- whole runs ----


def test_every_actor_has_a_lane_on_the_driver_s_clock(tmp_path):
    cast = cast_of(in_no_hurry, learner={"num_ranks": 2}, metrics={"trace": True}, checkpoint={"memory_every_steps": 1})
    drive(tmp_path, cast)
    content = json.loads((tmp_path / TRACE).read_text())
    lanes = check_format(content)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in content if e["name"] == "thread_name"}
    by_name = {names[lane]: sorted(found, key=lambda event: event["ts"]) for lane, found in lanes.items()}
    assert {"driver", "learner-0", "learner-1"} <= by_name.keys()
    assert len({event["pid"] for found in by_name.values() for event in found}) >= 3, "each on a node of its own"

    training = [event for event in by_name["driver"] if event["name"] == "train"]
    assert [event["args"]["step"] for event in training] == list(range(6))
    own = [event for event in by_name["learner-1"] if event["name"] == "train_step"]
    assert len(own) == 6
    for phase, step in zip(training, own, strict=True):  # by its own clock it was a thousand seconds later, or more
        assert phase["ts"] - 1e4 <= step["ts"] <= step["ts"] + step["dur"] <= phase["ts"] + phase["dur"] + 1e4
    waits = [event for event in by_name["learner-1"] if event["name"] == "wait"]
    assert waits and sum(event["dur"] for event in waits) > 1e6
    for one, other in pairwise(by_name["driver"]):
        assert other["ts"] - one["ts"] - one["dur"] < 1e3, "the driver is always somewhere"
    told = [event["name"] for event in content if event["ph"] == "i"]
    assert told[0] == "start" and told[-1] == "end" and "checkpoint" in told


def test_without_it_nobody_is_asked_and_nothing_is_written(tmp_path):
    asked = []
    cast = cast_of()
    on_call(cast, "timeline", 1, asked.append)
    drive(tmp_path, cast)
    assert not asked and not (tmp_path / TRACE).exists()


def test_a_trace_that_cannot_be_written_costs_itself_and_a_warning(tmp_path):
    (tmp_path / TRACE).mkdir(parents=True)
    (tmp_path / BEFORE).write_text("a file, whose place no directory can take")
    cast = cast_of(in_no_hurry, metrics={"trace": True}, rollout={"num_generators": 2})
    on_call(cast, "generate", 3, die, role="student-generator")
    summary, _ = drive(tmp_path, cast)
    assert summary["steps"] == 6
    (said,) = events(tmp_path, "trace_failed")
    assert "the run goes on" in said["text"]


def test_a_trace_that_fails_in_whatever_way_costs_itself_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(TraceFile, "flush", lambda *_: 1 / 0)
    summary, _ = drive(tmp_path, cast_of(in_no_hurry, metrics={"trace": True}))
    assert summary["steps"] == 6
    (said,) = events(tmp_path, "trace_failed")
    assert "ZeroDivisionError" in said["text"] and events(tmp_path, "end")
