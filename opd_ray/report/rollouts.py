"""A sample of a run's logged rollouts for the viewer: tokens as text, log-probs of teacher and student.

The sample is chosen to be looked at, not to estimate rates: every step that is shown has its truncated and
its repetitive rollouts beside the ordinary ones, as far as there are any. Same run, same sample.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opd_ray.config import EMBEDDED_STUDENTS
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.report.runs import Run

MAX_STEPS = 24
"""Steps of one run that are shown: the last ones of those that were logged, and others spread evenly."""
_LAST_STEPS = 4
_FOLLOWED = 3
"""Prompts of which a rollout is shown at every step that has one, as far as there is room, the first of them at least:
the same prompt over steps."""
_DOUBTED = round(math.log(0.5) * 100)
"""Alternatives are shown where the teacher finds a token less likely than this, hundredths of a nat: elsewhere there
is little to choose."""
_NUM_ALTERNATIVES = 3
MAX_TOKENS = 600
"""Longer responses are shown with their middle left out."""
_MAX_PROMPT_CHARS = 2000
_NATS = 100
"""Log-probs are embedded as integers, in hundredths of a nat."""

_FIRST = ("", False, False)
"""The stratum of the followed prompts, before all others."""
_ENDINGS = {"stop": 0, "horizon": 2}
"""What the page knows of a finish reason; 1 for the others, which are truncated."""
_NOT_JUDGED = 2
"""Beside 0 for wrong and 1 for right."""
_COLUMNS = (
    "rollout_id", "source", "prompt_id", "prompt_tokens", "response_tokens", "behaviour_logprobs",
    "weight_versions", "finish_reason", "correct", "text", "teacher_logprobs", "repetitive", "prompt", "answer",
    "reference_logprobs", "teacher_top_ids", "teacher_top_logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the viewer shows of one run; ``rollouts`` and ``vocab`` are as the page's script reads them."""

    rollouts: list[dict[str, Any]]
    vocab: list[str]
    """Text of each token that occurs; rollouts refer to it by index."""
    logged: int
    """Rollouts in the run's log, of which this is a sample."""
    note: str
    """What a reader must know besides; empty if nothing."""
    signals: list[str] = field(default_factory=list)
    """Names of what else is known of each token, in the order in which rollouts have it."""


@dataclass(frozen=True)
class Signals:
    """What is known of the tokens of one step beside the log."""

    step: int
    of: dict[str, dict[str, Sequence[float]]]
    """Name to rollout id to a value for each response token; nan where there is none."""


def sample(run: Run, most: int, most_tokens: int = 200_000) -> Sample:
    """At most ``most`` rollouts of the run, of about ``most_tokens`` tokens, by step; prompts count as well.

    Every step that is shown has one rollout at least. Files that cannot be read are named in the note.
    """
    files = sorted((run.path / "rollouts").glob("step-*.parquet"))
    if not files:
        return Sample([], [], 0, "this run logged no rollouts")
    notes, rows, num_logged = [], [], 0
    last = files[-_LAST_STEPS:]
    chosen = [files[i] for i in _spread(len(files) - len(last), MAX_STEPS - len(last))] + last
    followed = _followed(chosen)
    for file in files:
        try:
            num_logged += pq.read_metadata(file).num_rows
            if file in chosen:
                rows += _choose(file, run, max(1, most // len(chosen)), most_tokens // len(chosen), followed)
        except (pa.ArrowException, OSError, KeyError) as error:
            notes.append(f"{file.name} cannot be read ({type(error).__name__})")
    if len(chosen) < len(files):
        notes.append(f"{len(chosen)} of {len(files)} logged steps")
    tokenizer = _tokenizer(run)
    if tokenizer is None:
        notes.append("no tokenizer was found, so token ids stand for text")
    vocab = _Vocabulary(tokenizer)
    return Sample([_pack(row, vocab) for row in rows], vocab.texts(), num_logged, "; ".join(notes))


def of_step(run: Run, signals: Signals, most: int, most_tokens: int = 200_000) -> Sample:
    """At most ``most`` rollouts of one step, with signals. Raises OSError or ArrowException for a log that cannot be
    read."""
    file = run.path / "rollouts" / f"step-{signals.step:06d}.parquet"
    rows = list(_choose(file, run, most, most_tokens, []))
    vocab, packed = _Vocabulary(_tokenizer(run)), []
    for row in rows:
        if any(row["rollout_id"] not in own for own in signals.of.values()):
            continue  # of the teacher's and only judged (buffer.evidence), so that no loss is of it
        keep = _kept(len(row["response_tokens"]))[2]
        own = [signals.of[name][row["rollout_id"]] for name in signals.of]
        values = [[_rounded(each[t]) for t in keep] for each in own]
        packed.append(_pack(row, vocab) | {"X": values})
    logged = pq.read_metadata(file).num_rows
    return Sample(packed, vocab.texts(), logged, f"of step {signals.step} alone", list(signals.of))


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of range(count), evenly, with both ends."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _followed(files: Sequence[Path]) -> list[str]:
    """The prompts that the student answered at most of these steps, and again; the most frequent first."""
    steps: Counter[str] = Counter()
    for file in files:
        with contextlib.suppress(pa.ArrowException, OSError, KeyError):  # what cannot be read is told later
            table = pq.read_table(file, columns=["prompt_id", "source"])
            steps.update(set(table.filter(pc.equal(table["source"], "student"))["prompt_id"].to_pylist()))
    most = sorted(steps.items(), key=lambda each: (-each[1], each[0]))[:_FOLLOWED]
    return [prompt for prompt, count in most if count > 1]


def _choose(file: Path, run: Run, most: int, most_tokens: int, followed: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one step: one of a followed prompt, then truncated, repetitive and ordinary student rollouts in turn, and
    a few of other sources."""
    table = pq.read_table(file, columns=[name for name in _COLUMNS if name in pq.read_schema(file).names])
    known = ("source", "finish_reason", "text", "repetitive", "prompt_id")
    known = [name for name in known if name in table.schema.names]
    strata: dict[tuple[str, bool, bool], list[int]] = {}
    repetitive, left = set(), set(followed)
    for index, row in enumerate(table.select(known).to_pylist()):
        repeats = _is_repetitive(row, run)
        repetitive |= {index} if repeats else set()
        kind = (row["source"], row["finish_reason"] not in ("stop", "horizon"), repeats)
        if row["source"] == "student" and row["prompt_id"] in left:
            left.remove(row["prompt_id"])
            kind = _FIRST
        strata.setdefault(kind, []).append(index)
    if _FIRST in strata:
        prompts = table["prompt_id"]
        strata[_FIRST].sort(key=lambda index: followed.index(prompts[index].as_py()))
    lengths = (pc.list_value_length(table[name]).fill_null(0) for name in ("prompt_tokens", "response_tokens"))
    tokens = sum(np.minimum(each.to_numpy(), MAX_TOKENS) for each in lengths)  # of each row, as many as are embedded
    taken = _of_each(strata, most)
    while len(taken) > 1 and (cost := int(tokens[taken].sum())) > most_tokens:
        most = max(1, min(len(taken) - 1, len(taken) * most_tokens // cost))
        taken = _of_each(strata, most)
    step = int(file.stem.removeprefix("step-"))
    for index, row in zip(taken, table.take(taken).to_pylist(), strict=True):
        yield row | {"step": step, "repetitive": index in repetitive}


def _of_each(strata: dict[tuple[str, bool, bool], list[int]], most: int) -> list[int]:
    """At most ``most`` rows, an eighth of them of other sources than the student where it sampled any."""
    students, others = (
        [rows for kind, rows in sorted(strata.items()) if (kind[0] in ("", "student")) is own] for own in (True, False)
    )
    few = _in_turn(others, min(most // 2, max(1, most // 8)) if students else most)
    return sorted([*_in_turn(students, most - len(few)), *few])


def _in_turn(strata: list[list[int]], most: int) -> list[int]:
    """One of each stratum, then the next of each, until ``most`` are taken or all are."""
    queues = [[rows[i] for i in _spread(len(rows), most)] for rows in strata]
    return [index for turn in zip_longest(*queues) for index in turn if index is not None][:most]


def _is_repetitive(row: dict[str, Any], run: Run) -> bool:
    """As the log says, or else as the run's own settings judge the text."""
    if row.get("repetitive") is not None:
        return bool(row["repetitive"])
    window, ratio = (run.config.get(f"metrics.repetition_{name}") for name in ("window_chars", "ratio"))
    if window is None or ratio is None:
        return False
    from opd_ray.repetition import is_repetitive

    return is_repetitive(row["text"], window_chars=window, ratio=ratio)


def _pack(row: dict[str, Any], vocab: _Vocabulary) -> dict[str, Any]:
    """One rollout in short names; "T" and "R" are null where teacher and reference did not score, "S" where the student
    did not sample; "alt" has token and log-prob of what the teacher finds most likely, where it doubts."""
    tokens, versions = row["response_tokens"], row["weight_versions"]
    head, tail, keep = _kept(len(tokens))
    teacher = _hundredths(row.get("teacher_logprobs"), keep)
    return {
        "id": row["rollout_id"],
        "of": row["prompt_id"],
        "step": row["step"],
        "src": row["source"],
        "cut": _ENDINGS.get(row["finish_reason"], 1),
        "end": row["finish_reason"],
        "rep": int(row["repetitive"]),
        "ok": _NOT_JUDGED if row["finish_reason"] == "horizon" else int(row["correct"]),
        "prompt": vocab.decode(row["prompt_tokens"]) or row.get("prompt") or row["prompt_id"],
        "answer": (row.get("answer") or "")[:_MAX_PROMPT_CHARS],
        "n": len(tokens),
        "gap": [head, tail - head],
        "ids": [vocab.index(tokens[t]) for t in keep],
        "T": teacher,
        "S": _hundredths(row["behaviour_logprobs"], keep) if row["source"] == "student" else None,
        "R": _hundredths(row.get("reference_logprobs"), keep),
        "alt": _alternatives(row, keep, teacher, vocab),
        "v": [min(versions), max(versions)] if versions else None,
    }


def _kept(number: int) -> tuple[int, int, list[int]]:
    """(where what is left out begins, where it ends, the places that are shown) of so many tokens."""
    head, tail = (number, number) if number <= MAX_TOKENS else (MAX_TOKENS // 2, number - MAX_TOKENS // 2)
    return head, tail, [*range(head), *range(tail, number)]


def _alternatives(
    row: dict[str, Any], keep: Sequence[int], teacher: list[int | None] | None, vocab: _Vocabulary
) -> dict[int, list[list[int]]]:
    """Place among the kept tokens to [token, hundredths of a nat] of each."""
    ids, logprobs, tokens = row.get("teacher_top_ids"), row.get("teacher_top_logprobs"), len(row["response_tokens"])
    if not ids or not teacher:
        return {}
    each, found = len(ids) // tokens, {}
    for place, t in enumerate(keep):
        if teacher[place] is None or teacher[place] < _DOUBTED:
            best = range(t * each, t * each + min(each, _NUM_ALTERNATIVES))
            found[place] = [
                [vocab.index(ids[i]), round(logprobs[i] * _NATS)] for i in best if math.isfinite(logprobs[i])
            ]
    return found


def _hundredths(logprobs: Sequence[float] | None, keep: Iterable[int]) -> list[int | None] | None:
    if not logprobs:
        return None
    return [round(logprobs[t] * _NATS) if math.isfinite(logprobs[t]) else None for t in keep]


class _Vocabulary:
    """Texts of the tokens that occur, each decoded once and by itself."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._indices: dict[int, int] = {}

    def index(self, token: int) -> int:
        return self._indices.setdefault(token, len(self._indices))

    def texts(self) -> list[str]:
        return [self._text(token) for token in self._indices]

    def decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, tokens[:_MAX_PROMPT_CHARS]))
        return self._tokenizer.decode(tokens, skip_special_tokens=False)[-_MAX_PROMPT_CHARS:]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"{token} "
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        # SentencePiece drops the space of a token that comes first, and each comes first here.
        return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def _tokenizer(run: Run) -> Any | None:
    """The student's, from where the run had it or from what the run exported."""
    path = str(run.config.get("student.path") or "")
    made_here = path in EMBEDDED_STUDENTS  # whose models share one tokenizer
    places = [TEACHER_DIR if made_here else Path(path), run.path / "student"]
    for place in places:
        if not (place / "tokenizer_config.json").is_file() and not (place / "tokenizer.json").is_file():
            continue
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except Exception:  # transformers raises nearly anything on a damaged directory; then ids are shown
            continue
    return None
