"""What every tracker promises, of the real libraries: what is logged is found again, and a resumed run goes on.

W&B runs offline and is read from the file that `wandb sync` would upload, MLflow has a store of files.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from opd_ray import config as configs
from opd_ray.watch.trackers import TRACKERS, Tracked, Tracker


@dataclass
class Found:
    """What can be looked at over there."""

    runs: set[str] = field(default_factory=set)
    loss: list[tuple[int, float]] = field(default_factory=list)
    text: str = ""
    """Everything that is said in words."""


def tensorboard(directory: Path) -> Found:
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    texts = [make_ndarray(event.tensor_proto) for tag in board.Tags()["tensors"] for event in board.Tensors(tag)]
    return Found(
        {directory.name},
        [(event.step, event.value) for event in board.Scalars("learner/loss")],
        "\n".join(text.item().decode() for text in texts),
    )


def wandb(directory: Path) -> Found:
    from wandb import teardown
    from wandb.proto.wandb_internal_pb2 import Record

    teardown()  # finish() does not wait until a run that is offline is in its file
    found = Found()
    for file in sorted(directory.glob("trackers/wandb/offline-run-*/*.wandb")):
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found.runs.add(record.run.run_id)
                found.text += f"{record.run.display_name} {record.run.project} {record.run.config}\n"
            if kind == "history":
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                found.loss.append((int(values["step"]), float(values["learner/loss"])))
            if kind in ("alert", "summary"):
                found.text += f"{getattr(record, kind)}\n"
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind seven bytes of W&B's: checksum, length, kind, content."""
    at = 7
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a record in several pieces: the test's run has become too large for one block"
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def mlflow(directory: Path) -> Found:
    from mlflow import MlflowClient

    client, found = MlflowClient(), Found()
    for run in client.search_runs([client.get_experiment_by_name("opd_ray").experiment_id]):
        found.runs.add(run.info.run_id)
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "learner/loss")
        found.loss += [(metric.step, metric.value) for metric in history]
        found.text += f"{run.data.tags} {run.data.params} {run.info.run_name}\n"
        for artifact in Path(run.info.artifact_uri.removeprefix("file://")).glob("*.json"):
            found.text += artifact.read_text()
    return found


READERS: dict[str, Callable[[Path], Found]] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tracker]:
    """Starts the tracker of the test's run, as each start of the run does."""
    pytest.importorskip(request.param)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    tracked = Tracked(run_dir, configs.load(None, ["seed=4", "name=Mine"]))
    return lambda: TRACKERS[request.param](tracked)


def beside(work: Callable[[], Any]) -> None:
    """In a thread, where trackers live."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    assert not thread.is_alive() and failures == []


def test_what_tensorboard_is_told_last_is_read_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: of files begun in one second the tenth was read before the ninth, so that what was undone stayed."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    tracker = TRACKERS["tensorboard"](Tracked(tmp_path, configs.load(None, [])))
    for number, loss in enumerate((0.5, 0.25)):
        tracker.begin(0, continued=number > 0)
        tracker.log(1, {"learner/loss": loss}, [])
    tracker.close()
    assert tensorboard(tmp_path).loss == [(1, 0.25)]


def test_every_tracker_is_held_to_it() -> None:
    assert READERS.keys() == TRACKERS.keys()


@pytest.mark.parametrize("start", TRACKERS, indirect=True)
def test_a_run_that_is_resumed_goes_on_where_it_was(start: Callable[[], Tracker], tmp_path: Path, request) -> None:
    name = request.node.callspec.params["start"]

    def first() -> None:
        tracker = start()
        tracker.begin(0, continued=False)
        tracker.log(1, {"learner/loss": 0.5, "pool/math-7b.v2_ready": 1.0}, [])
        tracker.log(2, {"learner/loss": 0.25}, [("guard/warn", "truncation is .31, above .25")])
        tracker.close()

    def second() -> None:
        """From the checkpoint of step 1; within it the run goes back once more."""
        tracker = start()
        tracker.begin(1, continued=True)
        tracker.log(2, {"learner/loss": 0.125}, [])
        tracker.begin(1, continued=True)
        tracker.log(2, {"learner/loss": 0.0625}, [])
        tracker.summarise({"steps": 2, "method": "stableopd", "eval_after": {"accuracy_sampled": 0.75}, "golden": {}})
        tracker.close()

    beside(first)
    beside(second)
    found = READERS[name](tmp_path / "first")
    assert len(found.runs) == 1, "one run over there"
    forgets = name == "tensorboard"  # the others keep what was undone, before what came after it
    undone = [] if forgets else [(2, 0.25), (2, 0.125)]
    assert found.loss == [(1, 0.5), *undone, (2, 0.0625)]
    for word in ("truncation is .31, above .25", "accuracy_sampled", "stableopd", "Mine", "first"):
        assert word in found.text or (forgets and word in ("first", "truncation is .31, above .25")), word
    left = [path for path in (tmp_path / "first").rglob("*") if path.is_file() and path.suffix == ".id"]
    assert len(left) == (0 if forgets else 1)
