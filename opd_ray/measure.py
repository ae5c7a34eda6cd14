"""Sums over a batch of rollouts of what METHOD §2 averages; sums of several batches add up."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from opd_ray.repetition import repeated_ngrams


def measure(rollouts: pa.RecordBatch, teacher_scores: pa.RecordBatch | None) -> dict[str, float]:
    """Sums over the student's response tokens, in nats where they are log-probs.

    tokens, repetitive_tokens    how many, and how many end an n-gram that their response held before
    behaviour_logprob            log μ
    teacher_logprob              log π_T, and
    teacher_logprob_repetitive   the same over the repetitive tokens
    advantage                    log π_T − log μ, and
    advantage_repetitive         the same over the repetitive tokens
    ends, eos_teacher_end        responses that ended by themselves, and the teacher's P(stop) at their last token
    cuts, eos_teacher_cut        truncated ones, and the teacher's P(stop) at theirs

    Without ``teacher_scores`` (a row of SCORE_SCHEMA per rollout) all that involve the teacher are left out; without
    its stop_logprobs, P(stop).
    """
    tokens, lengths = _flat(rollouts["response_tokens"])
    behaviour, _ = _flat(rollouts["behaviour_logprobs"])
    repetitive = repeated_ngrams(tokens.astype(np.int64), lengths) > 0
    sums = {
        "tokens": len(tokens),
        "repetitive_tokens": repetitive.sum(),
        "behaviour_logprob": behaviour.sum(),
    }
    if teacher_scores is not None:
        teacher, _ = _flat(teacher_scores["logprobs"])
        advantage = teacher - behaviour
        sums |= {
            "teacher_logprob": teacher.sum(),
            "teacher_logprob_repetitive": teacher[repetitive].sum(),
            "advantage": advantage.sum(),
            "advantage_repetitive": advantage[repetitive].sum(),
        }
        sums |= _stop_sums(rollouts["finish_reason"], lengths, teacher_scores["stop_logprobs"])
    return {name: float(value) for name, value in sums.items()}


def _stop_sums(finish_reasons: pa.Array, lengths: np.ndarray, stop_logprobs: pa.Array) -> dict[str, float]:
    logprobs, counts = _flat(stop_logprobs)
    if not np.array_equal(counts, lengths):
        return {}
    there = lengths > 0
    last = np.exp(logprobs[np.cumsum(lengths)[there] - 1])
    ended = (finish_reasons.to_numpy(zero_copy_only=False) == "stop")[there]
    return {
        "ends": ended.sum(),
        "eos_teacher_end": last[ended].sum(),
        "cuts": (~ended).sum(),
        "eos_teacher_cut": last[~ended].sum(),
    }


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, log-probs as float64, and the length of each row."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return (values.astype(np.float64) if values.dtype == np.float32 else values), lengths
