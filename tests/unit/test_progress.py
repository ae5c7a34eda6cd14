"""What takes a while says how far it is; what does not says nothing."""

from __future__ import annotations

import pytest

from opd_ray import progress
from opd_ray.progress import watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def said(clock: list[float], capsys: pytest.CaptureFixture[str], total: int | None, pause_s: float) -> list[str]:
    for item in watched(range(5), "rows", total):
        clock[0] += pause_s if item else 60.0  # the first one may need an import
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()


def test_what_is_done_soon_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal is one line, and nothing stands before it."""
    assert said(clock, capsys, 5, pause_s=1.0) == []


def test_what_takes_long_says_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(clock, capsys, 5, pause_s=9.0) == ["rows: 60 %", "rows: 100 %"]
    assert said(clock, capsys, None, pause_s=11.0) == ["rows: 3", "rows: 4", "rows: 5"]
