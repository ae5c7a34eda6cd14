"""The recorder: which columns a row of the rollout log has, and payloads cut to size."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ObjectLostError

from opd_ray.errors import Unwritable
from opd_ray.messages import ROLLOUT_SCHEMA, SCORE_SCHEMA, Entry
from opd_ray.watch import recorder as module
from opd_ray.watch.recorder import Recorder
from small_messages import meta


@pytest.fixture
def recorder(monkeypatch):
    """One whose refs are the payloads themselves."""
    monkeypatch.setattr(module.ray, "get", lambda ref: ref)
    return Recorder()


def rollouts(num_rows=3, source="student"):
    rows = [
        {
            "rollout_id": f"{index}-0",
            "slot": index,
            "prompt_id": str(index),
            "source": source,
            "prompt_tokens": [1, 2],
            "response_tokens": [3] * (index + 1),
            "behaviour_logprobs": [-1.0] * (index + 1),
            "weight_versions": [0] * (index + 1),
            "topk_ids": [],
            "privileged_prompt_tokens": [],
            "finish_reason": "stop",
            "correct": True,
            "text": "a",
        }
        for index in range(num_rows)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=ROLLOUT_SCHEMA)


def scores(value, num_rows=3):
    rows = [
        {name: [] for name in SCORE_SCHEMA.names} | {"rollout_id": f"{index}-0", "logprobs": [value] * (index + 1)}
        for index in range(num_rows)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA)


def test_a_row_has_the_teacher_that_scored_it_and_the_reference(recorder, tmp_path):
    payload = rollouts()
    entries = [
        Entry(
            meta(0, teacher="algebra", tail_period=3, horizon=5),
            2,
            payload,
            {"algebra": scores(-2), "reference": scores(-3)},
        ),
        Entry(meta(1, repetitive=True), 0, payload, {"first": scores(-4), "second": scores(-5)}),
        Entry(meta(2), 1, payload, {}),
    ]
    asked = [("1+1", "2"), ("one", ""), ("two", "b")]
    assert recorder.write(str(tmp_path / "rollouts"), 7, entries, asked, 1) == 3
    (file,) = (tmp_path / "rollouts").iterdir()
    assert file.name == "step-000007.parquet"
    table = pq.read_table(file).to_pydict()
    assert set(ROLLOUT_SCHEMA.names) < table.keys()
    assert table["step"] == [7] * 3
    assert [*zip(table["prompt"], table["answer"], strict=True)] == asked
    assert table["rollout_id"] == ["2-0", "0-0", "1-0"]
    assert table["teacher"] == ["algebra", "first", None]
    assert table["teacher_logprobs"] == [[-2.0] * 3, [-4.0], None]
    assert table["reference_logprobs"] == [[-3.0] * 3, None, None]
    assert table["horizon"] == [5, None, None]
    assert (table["tail_period"], table["repetitive"]) == ([3, 0, 0], [False, True, False])


def test_the_teachers_most_probable_tokens_are_kept_a_few_for_each_position(recorder, tmp_path):
    top = {"topk_ids": [1, 2, 3, 4, 5, 6], "topk_logprobs": [-5.0, -4.0, -3.0, -2.0, -1.0, -6.0]}
    row = {name: [] for name in SCORE_SCHEMA.names} | {"rollout_id": "0-0", "logprobs": [-2.0]} | top
    scored = pa.RecordBatch.from_pylist([row], schema=SCORE_SCHEMA)
    entries = [
        Entry(meta(0), 0, rollouts(), {"teacher": scored, "reference": scores(-3)}),
        Entry(meta(1), 1, rollouts()),
    ]
    recorder.write(str(tmp_path), 7, entries, [("?", "")] * 2, 1)
    table = pq.read_table(tmp_path / "step-000007.parquet").to_pydict()
    assert table["teacher_top_ids"] == [[5, 4, 3, 2], None]
    assert table["teacher_top_logprobs"] == [[-1.0, -2.0, -3.0, -4.0], None]


def test_a_rollout_that_is_gone_keeps_its_row_with_what_is_known_of_it(recorder, tmp_path, monkeypatch):
    """Nobody could count the prompts that were trained on if rows were missing."""

    def get(ref):
        if ref == "gone":
            raise ObjectLostError("00" * 28, "", "")
        return ref

    monkeypatch.setattr(module.ray, "get", get)
    entries = [
        Entry(meta(5, prompt_id="p5", rollout_id="5-0", num_response_tokens=8), 1, "gone", {"teacher": scores(-2)}),
        Entry(meta(1), 0, rollouts(), {"teacher": "gone", "reference": scores(-3)}),
    ]
    assert recorder.write(str(tmp_path), 7, entries, [("?", "")] * 2, 1) == 2
    table = pq.read_table(tmp_path / "step-000007.parquet").to_pydict()
    assert (table["rollout_id"], table["slot"], table["prompt_id"]) == (["5-0", "0-0"], [5, 0], ["p5", "0"])
    assert (table["response_tokens"], table["text"]) == ([[], [3]], ["", "a"])
    assert (table["finish_reason"], table["source"], table["correct"]) == (["stop"] * 2, ["student"] * 2, [True] * 2)
    assert table["teacher_logprobs"] == [[-2.0] * 2, None]
    assert table["reference_logprobs"] == [None, [-3.0]]


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_that_takes_space(recorder, tmp_path, monkeypatch):
    """The bug: an ActorError without a word of what to do, and half a file."""

    def full(table, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.pq, "write_table", full)
    with pytest.raises(Unwritable, match=r"step-000007.parquet cannot be written \(No space left on device\); free"):
        recorder.write(str(tmp_path), 7, [Entry(meta(2), 1, rollouts(), {})], [("?", "")], 1)
    assert list(tmp_path.iterdir()) == []


def test_a_payload_is_got_once_for_all_of_its_rows(recorder, tmp_path, monkeypatch):
    got, payload, teacher = [], rollouts(), scores(-2.0)
    monkeypatch.setattr(module.ray, "get", lambda ref: got.append(ref) or ref)
    entries = [Entry(meta(slot), slot, payload, {"teacher": teacher}) for slot in range(3)]
    recorder.write(str(tmp_path), 1, entries, [("?", "")] * 3, 1)
    assert [id(ref) for ref in got] == [id(payload), id(teacher)]
    written = pq.read_table(tmp_path / "step-000001.parquet")
    assert written["rollout_id"].to_pylist() == ["0-0", "1-0", "2-0"]
    assert written["teacher_logprobs"].to_pylist() == [[-2.0] * (slot + 1) for slot in range(3)]


def test_it_holds_the_payloads_of_one_call_at_a_time(recorder, tmp_path, monkeypatch):
    """The bug: all of a step's, hidden states included, had to lie in the object store of the driver's node at once."""
    most = 0

    def get(ref):
        nonlocal most
        if ref == "rollouts":
            return rollouts(1)
        most = max(most, pa.total_allocated_bytes() - before)
        return with_alternatives(100_000)  # .8 MB

    monkeypatch.setattr(module.ray, "get", get)
    entries = [Entry(meta(slot), 0, "rollouts", {"teacher": f"scores {slot}"}) for slot in range(8)]
    before = pa.total_allocated_bytes()
    assert recorder.write(str(tmp_path), 1, entries, [("?", "")] * 8, 1) == 8
    assert most < 0.4e6


def with_alternatives(number):
    row = {name: [] for name in SCORE_SCHEMA.names} | {"rollout_id": "0-0", "logprobs": [-1.0]}
    row |= {"topk_ids": np.arange(number, dtype=np.int32), "topk_logprobs": -np.arange(number, dtype=np.float32)}
    return pa.RecordBatch.from_pylist([row], schema=SCORE_SCHEMA)


def test_selected_rows_are_a_payload_of_their_own(recorder):
    number, selected = recorder.select([(0, 3), (1, 0), (0, 3)], rollouts(5), rollouts(2))
    assert number == 3
    assert isinstance(selected, pa.RecordBatch)
    assert selected.schema == ROLLOUT_SCHEMA
    assert selected["response_tokens"].to_pylist() == [[3] * 4, [3], [3] * 4]


def test_it_measures_what_it_is_given(recorder):
    sums = recorder.measure(rollouts(), scores(-2.0))
    assert (sums["tokens"], sums["advantage"]) == (6, -6.0)


def test_the_oldest_files_of_the_log_make_room_for_the_newest(recorder, tmp_path):
    """The bug: the log of a long run grew without a bound."""
    for step in (1, 10, 999_999, 1_000_000):
        recorder.write(str(tmp_path), step, [Entry(meta(2), 1, rollouts(), {})], [("?", "")], 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-1000000.parquet", "step-999999.parquet"]
