"""Trackers that fail, hang or fall behind, and what is asked of those that are not set up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_ray import config as configs
from opd_ray.errors import InputError
from opd_ray.watch import tracking as module
from opd_ray.watch.trackers import Tracked, check_trackers
from opd_ray.watch.tracking import Tracking


class FakeTracker:
    """Notes every call with its thread; ``before`` may fail or wait."""

    before: Callable[[str], None] = staticmethod(lambda call: None)

    def __init__(self, run: Tracked) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[threading.Thread] = set()
        FakeTracker.last = self
        self._note("make")

    def _note(self, *call: Any) -> None:
        FakeTracker.before(call[0])
        self.calls.append(call)
        self.threads.add(threading.current_thread())

    def begin(self, step: int, *, continued: bool) -> None:
        self._note("begin", step, continued)

    def log(self, step: int, metrics: Any, said: Any) -> None:
        self._note("log", step)

    def summarise(self, summary: Any) -> None:
        self._note("summarise")

    def close(self) -> None:
        self._note("close")


@pytest.fixture
def gate() -> Any:
    """Opened when the test ends, so that no thread is left behind."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tracking, list[str]]]:
    """A fake tracker beside one that is sound, and what was said of them."""
    monkeypatch.setattr(FakeTracker, "before", staticmethod(lambda call: None))

    def make(before: Callable[[str], None] = lambda call: None, **limits: float) -> tuple[Tracking, list[str]]:
        FakeTracker.before = staticmethod(before)
        monkeypatch.setitem(module.TRACKERS, "wandb", FakeTracker)
        said: list[str] = []
        config = configs.load(None, ["metrics.trackers=[wandb]"])
        return Tracking(Tracked(tmp_path, config), lambda kind, text, **_: said.append(text), **limits), said

    return make


def a_run(tracking: Tracking) -> None:
    tracking.begin(0, continued=False)
    tracking.log(1, {"a": 1.0}, [])
    tracking.begin(0, continued=True)
    tracking.log(1, {"a": 2.0}, [])
    tracking.summarise({"steps": 1})
    tracking.close()


def test_a_tracker_gets_everything_in_order_and_in_one_thread(tracked) -> None:
    tracking, said = tracked()
    a_run(tracking)
    names = [call[0] for call in FakeTracker.last.calls]
    assert names == ["make", "begin", "log", "begin", "log", "summarise", "close"]
    assert len(FakeTracker.last.threads) == 1 and threading.current_thread() not in FakeTracker.last.threads
    assert said == []


def test_after_the_end_no_thread_waits_and_nobody_waits_for_one(tracked) -> None:
    """The bug: the thread of a tracker that was given up slept on, and a second close waited for one that had ended."""
    tracking, said = tracked()
    a_run(tracking)
    for thread in FakeTracker.last.threads:
        thread.join(20)
        assert not thread.is_alive()
    tracking.log(2, {}, [])
    tracking.close()
    assert said == []


def test_one_that_is_given_up_is_woken_to_end(tracked) -> None:
    tracking, said = tracked()
    tracking.begin(0, continued=False)
    tracking._lanes[0].lose("is not wanted")
    for thread in FakeTracker.last.threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(said) == 1


@pytest.mark.parametrize("call", ["make", "begin", "log", "summarise", "close"])
def test_one_that_fails_costs_one_warning(tracked, call: str) -> None:
    def fail(now: str) -> None:
        if now == call:
            raise OSError("no such\nproject")

    tracking, said = tracked(fail)
    a_run(tracking)
    assert said == [
        "tracker wandb failed (no such project): the run goes on without it; metrics.jsonl has everything"
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["make", "begin", "log", "close"])
def test_one_that_hangs_costs_one_warning_and_no_more_time_than_it_is_given(tracked, gate, call: str) -> None:
    """Its adversary is a gate that does not open before the run has ended."""
    tracking, said = tracked(lambda now: gate.wait(30) if now == call else None, begin_s=0.02, close_s=0.02)
    a_run(tracking)
    assert not gate.is_set()
    assert [text.partition(":")[0] for text in said] == [
        "tracker wandb has not taken everything in within 0.02 s of the end"
    ]
    tracking.close()
    assert len(said) == 1


def test_one_that_falls_behind_is_given_up_before_the_memory_is(tracked, gate, monkeypatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    tracking, said = tracked(lambda now: gate.wait(30) if now == "log" else None, close_s=30.0)
    tracking.begin(0, continued=False)
    for step in range(100):
        tracking.log(step, {}, [])
    tracking.begin(0, continued=True)
    tracking.close()
    assert said == ["tracker wandb is 4 records behind: the run goes on without it; metrics.jsonl has everything"]


@pytest.mark.parametrize(
    ("trackers", "environment", "said"),
    [
        ("wandb", {}, "WANDB_API_KEY is not set; set it, or log in .wandb login., or set WANDB_MODE=offline"),
        ("wandb", {"NETRC": "mine"}, None),  # what `wandb login` leaves
        ("wandb", {"HOME": "."}, None),
        ("wandb", {"HOME": ".", "WANDB_BASE_URL": "https://wandb.example.org"}, "WANDB_API_KEY is not set"),
        ("wandb", {"NETRC": "broken"}, "WANDB_API_KEY is not set"),
        ("mlflow", {}, "MLFLOW_TRACKING_URI is not set; set it to your server"),
        ("wandb", {"WANDB_MODE": "offline"}, None),
        ("wandb", {"WANDB_API_KEY": "secret"}, None),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://host:5000"}, None),
    ],
)
def test_what_is_not_set_up_is_told_before_the_run(
    monkeypatch, tmp_path: Path, trackers: str, environment, said: str | None
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    for file in ("mine", ".netrc"):
        (tmp_path / file).write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "broken").write_text("machine api.wandb.ai login")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("opd_ray.watch.trackers.importlib.util.find_spec", lambda name: name)
    config = configs.load(None, [f"metrics.trackers=[{trackers}]"])
    if said is None:
        check_trackers(config)
    else:
        with pytest.raises(InputError, match=said):
            check_trackers(config)
    assert "secret" not in configs.to_yaml(config)


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch) -> None:
    monkeypatch.setattr("opd_ray.watch.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"has mlflow, but .* pip install 'opd_ray\[mlflow\]'"):
        check_trackers(configs.load(None, ["metrics.trackers=[mlflow]"]))


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(InputError, match="metrics.trackers.0: Input should be 'tensorboard', 'wandb' or 'mlflow'"):
        configs.load(None, ["metrics.trackers=[wanb]"])
