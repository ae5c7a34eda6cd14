"""Metrics of rollouts, on cases one can count by hand."""

import pytest

from factories import meta
from opd_ray.metrics import is_repetitive, rollout_metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3=2?" * 20, True),
        ("5-0=5;5-6=6;6+6=5#5", False),  # shorter than the window
        ("the quick brown fox jumps over the lazy dog again", False),
        ("the quick brown fox jumps over it. " + "1+1=3?" * 10, True),  # only the tail counts
    ],
)
def test_repetition_looks_at_how_well_the_tail_compresses(text, expected):
    assert is_repetitive(text, window_chars=40, ratio=1.7) is expected


def test_rollout_metrics_by_hand():
    metas = [
        meta(0, num_response_tokens=10, oldest_version=3, mean_version=3.0),
        meta(1, num_response_tokens=30, finish_reason="length", correct=False, oldest_version=2, mean_version=2.5),
    ]
    metrics = rollout_metrics(metas, version=4)
    assert metrics["rollouts/accuracy"] == 0.5
    assert metrics["rollouts/truncation_rate"] == 0.5
    assert metrics["rollouts/truncated_token_share"] == 0.75
    assert metrics["rollouts/length"] == 20
    assert metrics["staleness/max"] == 2
    assert metrics["staleness/mean"] == pytest.approx(4 - (10 * 3.0 + 30 * 2.5) / 40)


def test_without_student_rollouts_there_is_nothing_to_say():
    assert rollout_metrics([], version=0) == {}
