"""Sums of METHOD §2 over payloads, against a loop over tokens."""

import numpy as np
import pyarrow as pa
import pytest

from opd_ray.messages import ROLLOUT_SCHEMA, SCORE_SCHEMA
from opd_ray.watch.recorder import Recorder

LENGTHS = (9, 30, 1, 14)


def payloads(stop_logprobs=True):
    rng = np.random.default_rng(0)
    rollouts, scores = [], []
    for index, length in enumerate(LENGTHS):
        tokens = np.tile([4, 5, 6], 10)[:length] if index == 1 else rng.integers(0, 50, length)
        rollouts.append(
            {
                "rollout_id": f"{index}-0",
                "slot": index,
                "prompt_id": str(index),
                "source": "student",
                "prompt_tokens": [1, 2],
                "response_tokens": tokens,
                "behaviour_logprobs": -rng.random(length),
                "weight_versions": [0] * length,
                "topk_ids": [],
                "privileged_prompt_tokens": [],
                "finish_reason": "length" if index in (1, 3) else "stop",
                "correct": False,
                "text": "",
            }
        )
        scores.append(
            {
                "rollout_id": f"{index}-0",
                "logprobs": -2 * rng.random(length),
                "topk_ids": [],
                "topk_logprobs": [],
                "given_logprobs": [],
                "stop_logprobs": -3 * rng.random(length) if stop_logprobs else [],
                "hidden": [],
            }
        )
    return (
        pa.RecordBatch.from_pylist(rollouts, schema=ROLLOUT_SCHEMA),
        pa.RecordBatch.from_pylist(scores, schema=SCORE_SCHEMA),
    )


def by_definition(rollouts, scores):
    names = ["tokens", "repetitive_tokens", "teacher_logprob", "advantage"]
    names += ["advantage_repetitive", "ends", "eos_teacher_end", "cuts", "eos_teacher_cut"]
    sums = dict.fromkeys(names, 0.0)
    for row, score in zip(rollouts.to_pylist(), scores.to_pylist(), strict=True):
        tokens, seen = row["response_tokens"], set()
        for t in range(len(tokens)):
            gram = tuple(tokens[t - 5 : t + 1]) if t >= 5 else None
            repetitive = gram is not None and gram in seen
            seen.add(gram)
            behaviour, teacher = row["behaviour_logprobs"][t], score["logprobs"][t]
            for name, value in (
                ("tokens", 1),
                ("teacher_logprob", teacher),
                ("advantage", teacher - behaviour),
                ("repetitive_tokens", repetitive),
                ("advantage_repetitive", repetitive * (teacher - behaviour)),
            ):
                sums[name] += value
        where = "end" if row["finish_reason"] == "stop" else "cut"
        sums[f"{where}s"] += 1
        sums[f"eos_teacher_{where}"] += np.exp(score["stop_logprobs"][-1])
    return sums


def test_sums_equal_a_loop_over_tokens():
    rollouts, scores = payloads()
    expected = by_definition(rollouts, scores)
    assert expected["repetitive_tokens"] > 10
    assert Recorder().measure(rollouts, scores) == pytest.approx(expected, rel=1e-6)


def test_sums_of_parts_add_up():
    rollouts, scores = payloads()
    parts = [Recorder().measure(rollouts.slice(start, 2), scores.slice(start, 2)) for start in (0, 2)]
    assert {name: parts[0][name] + parts[1][name] for name in parts[0]} == pytest.approx(
        Recorder().measure(rollouts, scores)
    )


def test_without_stop_logprobs_nothing_is_said_about_stopping():
    rollouts, scores = payloads(stop_logprobs=False)
    sums = Recorder().measure(rollouts, scores)
    assert "advantage" in sums
    assert not {"ends", "cuts", "eos_teacher_end", "eos_teacher_cut"} & sums.keys()


def test_no_rollouts_sum_to_nothing():
    rollouts, scores = payloads()
    assert set(Recorder().measure(rollouts.slice(0, 0), scores.slice(0, 0)).values()) == {0.0}
