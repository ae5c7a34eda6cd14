"""Structured logs: what a line carries, and the driver's events on the console and in their file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from opd_ray.rooms import logs
from opd_ray.rooms.node import this_node
from opd_ray.watch.events import Events


@pytest.fixture
def here(monkeypatch):
    """A worker's process that nothing was said about yet."""
    monkeypatch.setenv(logs.ROOM_VARIABLE, "learn")
    logs._here.cache_clear()
    yield
    logs._here.cache_clear()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_carries_the_room_the_node_and_what_the_call_adds(here, caplog):
    caplog.set_level(logging.INFO)
    log = logs.get("opd_ray.somewhere")
    logs.at(version=6)
    log.info("trained %d tokens", 5, extra={"step": 7})
    log.info("idle")
    trained, idle = caplog.records
    assert (trained.name, trained.getMessage(), trained.levelname) == ("opd_ray.somewhere", "trained 5 tokens", "INFO")
    assert (trained.step, trained.version, trained.room, trained.node) == (7, 6, "learn", this_node())
    assert not hasattr(idle, "step")
    assert idle.version == 6


def test_the_nearest_word_on_a_field_counts(here, caplog):
    caplog.set_level(logging.INFO)
    logs.at(step=1, version=1)
    logs.get("opd_ray.somewhere").info("", extra={"step": 3})
    assert (caplog.records[0].step, caplog.records[0].version) == (3, 1)


def test_an_event_is_one_line_for_people_and_one_for_machines(tmp_path, capsys):
    events = Events(tmp_path / "events.jsonl")
    events.say("start", "begins")
    text = "generate: student-generator-1 died"
    events.say("death", text, step=4, version=4, room="generate", node=Path("n"), waited_s=math.nan)
    events.say("checkpoint", "step 5 is saved", step=5, version=6)
    assert capsys.readouterr().out.splitlines() == [
        "begins",
        "generate: student-generator-1 died",
        "step 5 is saved",
    ]
    start, death, saved = read(tmp_path / "events.jsonl")
    assert (start["kind"], start["text"], start["step"], start["version"]) == ("start", "begins", None, None)
    assert death.pop("time").endswith("+00:00")
    assert death == {
        "kind": "death",
        "text": "generate: student-generator-1 died",
        "step": 4,
        "version": 4,
        "room": "generate",
        "node": "n",
        "waited_s": None,
    }
    assert (saved["step"], saved["version"]) == (5, 6)


def test_a_resumed_run_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "events.jsonl"
    Events(path).say("start", "first")
    path.write_bytes(path.read_bytes() + b'{"time": "2026-0')
    events = Events(path)
    events.say("start", "second")
    events.say("end", "third")
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["text"] for i in (0, 2, 3)] == ["first", "second", "third"]


def test_a_file_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    (tmp_path / "events.jsonl").mkdir()
    Events(tmp_path / "events.jsonl").say("death", "a worker died")
    captured = capsys.readouterr()
    assert captured.out == "a worker died\n"
    assert "events.jsonl was not written" in captured.err and "only here" in captured.err


def test_only_workers_log_json():
    """The driver's loggers are left alone: Ray takes the setting to the workers."""
    before = (logging.getLogger().handlers[:], logging.getLogger().level)
    config = logs.job_config()
    assert config.py_logging_config.encoding == "JSON"
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
