"""Recorder: writes, measures and cuts payloads, so that they need not pass through the driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError

from opd_ray.disk import private, whole, writing
from opd_ray.messages import REFERENCE, ROLLOUT_SCHEMA, Entry, MemoryUse, RolloutMeta, Spans
from opd_ray.repetition import repeated_ngrams
from opd_ray.rooms import logs, spans
from opd_ray.rooms.memory import own_memory
from opd_ray.rooms.node import this_node

_log = logs.get(__name__)
_FLOATS = pa.list_(pa.float32())
_OF_SCORES = ("logprobs", "topk_ids", "topk_logprobs")
_ALTERNATIVES = 4
"""Of the teacher's most probable tokens, at each of a response's, that the log keeps."""


class Recorder:
    """Lives on the driver's node, where the run directory is."""

    def node(self) -> str:
        return this_node()

    def memory(self) -> MemoryUse:
        return own_memory()

    def timeline(self) -> Spans:
        return spans.collect()

    @spans.spanned("write")
    def write(
        self, directory: str, step: int, entries: Sequence[Entry], asked: Sequence[tuple[str, str]], keep: int
    ) -> int:
        """Writes step-N.parquet into ``directory`` and deletes all but the newest ``keep``; returns its number of rows.

        A row has the step that trained on it, ``prompt`` and ``answer`` (the text that was ``asked`` and the expected
        answer, "" where unknown), the rollout columns, ``repetitive``, ``tail_period``, ``worker`` and ``horizon`` of
        its meta, ``taught_by`` (what evidence left it to; null without), and the log-probs of the response tokens by
        the teacher that scored it (its name is in ``teacher``; of several that are weighted, the first) and by the
        reference; null where nobody scored. ``teacher_top_ids`` and ``teacher_top_logprobs``, [T, n] token by token,
        are the teacher's most probable tokens, where its top-k was asked for. Of a rollout that is gone with its node
        since it was trained on, the row has what its meta says.
        Raises Unwritable.
        """
        fetched = _Fetched()
        table = pa.Table.from_batches([_row(entry, fetched) for entry in entries])
        prompts, answers = (pa.array(texts, pa.string()) for texts in zip(*asked, strict=True))
        columns = {"step": pa.array([step] * len(table), pa.int32()), "prompt": prompts, "answer": answers}
        for at, (name, column) in enumerate(columns.items()):
            table = table.add_column(at, name, column)
        target = Path(directory) / f"step-{step:06d}.parquet"
        with writing(target), private():
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as partial:
                pq.write_table(table, partial)
            files = sorted(target.parent.glob("step-*.parquet"), key=lambda file: int(file.stem.removeprefix("step-")))
            for file in files[:-keep]:
                file.unlink(missing_ok=True)
        _log.info("wrote %d rollouts to %s", len(table), target, extra={"step": step})
        return len(table)

    @spans.spanned("measure")
    def measure(self, rollouts: pa.RecordBatch, teacher_scores: pa.RecordBatch) -> dict[str, float]:
        """Sums over the student's response tokens, in nats where they are log-probs; a row of scores per rollout.

        tokens, repetitive_tokens    how many, and how many end an n-gram that their response held before
        teacher_logprob              log π_T
        advantage                    log π_T − log μ, and
        advantage_repetitive         the same over the repetitive tokens
        ends, eos_teacher_end        responses that ended by themselves, and the teacher's P(stop) at their last token
        cuts, eos_teacher_cut        truncated ones, and the teacher's P(stop) at theirs; left out without stop_logprobs
        """
        tokens, lengths = _flat(rollouts["response_tokens"])
        behaviour, teacher = (
            _flat(column)[0] for column in (rollouts["behaviour_logprobs"], teacher_scores["logprobs"])
        )
        repetitive = repeated_ngrams(tokens.astype(np.int64), lengths) > 0
        advantage = teacher - behaviour
        sums = {
            "tokens": len(tokens),
            "repetitive_tokens": repetitive.sum(),
            "teacher_logprob": teacher.sum(),
            "advantage": advantage.sum(),
            "advantage_repetitive": advantage[repetitive].sum(),
        }
        stops, counts = _flat(teacher_scores["stop_logprobs"])
        if np.array_equal(counts, lengths):
            there = lengths > 0
            last = np.exp(stops[np.cumsum(lengths)[there] - 1])
            ended = (rollouts["finish_reason"].to_numpy(zero_copy_only=False) == "stop")[there]
            sums |= {"ends": ended.sum(), "eos_teacher_end": last[ended].sum()}
            sums |= {"cuts": (~ended).sum(), "eos_teacher_cut": last[~ended].sum()}
        return {name: float(value) for name, value in sums.items()}

    @spans.spanned("select")
    def select(self, rows: Sequence[tuple[int, int]], *batches: pa.RecordBatch) -> tuple[int, pa.RecordBatch]:
        """Some rows of payloads, (which payload, its row) in the order asked for, as a payload of their own; and their
        number."""
        return len(rows), pa.concat_batches([batches[at].slice(row, 1) for at, row in rows])


class _Fetched:
    """Rows of payloads, of which it has one of a kind at a time: all rollouts of a call share theirs, and those of a
    step with the teacher's hidden states may be more than a node's object store can hold."""

    def __init__(self) -> None:
        self._payloads: dict[str, tuple[ObjectRef, pa.RecordBatch | None]] = {}

    def row(self, kind: str, ref: ObjectRef, row: int, columns: Sequence[str]) -> pa.RecordBatch | None:
        """A copy of one row of a payload; None where it is gone."""
        if kind not in self._payloads or self._payloads[kind][0] is not ref:
            self._payloads.pop(kind, None)
            try:
                self._payloads[kind] = ref, ray.get(ref).select(columns)
            except ObjectLostError:
                self._payloads[kind] = ref, None
        payload = self._payloads[kind][1]
        return None if payload is None else pa.concat_batches([payload.slice(row, 1)])


def _row(entry: Entry, fetched: _Fetched) -> pa.RecordBatch:
    meta = entry.meta
    row = fetched.row("rollouts", entry.rollouts, entry.row, ROLLOUT_SCHEMA.names) or _from_meta(meta)
    teachers = [role for role in entry.scores if role != REFERENCE]
    teacher = meta.teacher if meta.teacher in teachers else next(iter(teachers), None)
    columns = {
        "repetitive": pa.array([meta.repetitive], pa.bool_()),
        "tail_period": pa.array([meta.tail_period], pa.int32()),
        "worker": pa.array([meta.worker], pa.string()),
        "horizon": pa.array([meta.horizon], pa.int32()),
        "taught_by": pa.array([entry.taught_by], pa.string()),
        "teacher": pa.array([teacher], pa.string()),
    }
    for column, role in (("teacher_logprobs", teacher), ("reference_logprobs", REFERENCE)):
        scores = fetched.row(role, entry.scores[role], entry.row, _OF_SCORES) if role in entry.scores else None
        columns[column] = pa.nulls(1, _FLOATS) if scores is None else scores["logprobs"]
        if role == teacher:
            columns |= _alternatives(scores)
    for name, column in columns.items():
        row = row.append_column(name, column)
    return row


def _alternatives(scores: pa.RecordBatch | None) -> dict[str, pa.Array]:
    """The most probable tokens of one row, a few for each of its own; null where they are not known."""
    tokens = 0 if scores is None else len(scores["logprobs"][0])
    if not tokens or not len(scores["topk_ids"][0]):
        return {"teacher_top_ids": pa.nulls(1, pa.list_(pa.int32())), "teacher_top_logprobs": pa.nulls(1, _FLOATS)}
    ids, logprobs = (_flat(scores[name])[0].reshape(tokens, -1) for name in ("topk_ids", "topk_logprobs"))
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :_ALTERNATIVES]
    ids, logprobs = (np.take_along_axis(each, best, axis=1).ravel() for each in (ids, logprobs))
    return {
        "teacher_top_ids": pa.array([ids], pa.list_(pa.int32())),
        "teacher_top_logprobs": pa.array([logprobs.astype(np.float32)], _FLOATS),
    }


def _from_meta(meta: RolloutMeta) -> pa.RecordBatch:
    known = dataclasses.asdict(meta)
    values = {
        field.name: [known.get(field.name, "" if pa.types.is_string(field.type) else [])] for field in ROLLOUT_SCHEMA
    }
    return pa.RecordBatch.from_pydict(values, schema=ROLLOUT_SCHEMA)


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, log-probs as float64, and the length of each row."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return (values.astype(np.float64) if values.dtype == np.float32 else values), lengths
