"""Metrics of rollouts, on cases one can count by hand."""

import pytest

from factories import meta
from opd_ray.metrics import rollout_metrics


def test_rollout_metrics_by_hand():
    metas = [
        meta(0, num_response_tokens=10, oldest_version=3, mean_version=3.0),
        meta(
            1,
            num_response_tokens=30,
            finish_reason="length",
            correct=False,
            oldest_version=2,
            mean_version=2.5,
            tail_period=4,
        ),
    ]
    metrics = rollout_metrics(metas, version=4, budget=30)
    assert metrics["rollouts/accuracy"] == 0.5
    assert metrics["rollouts/truncation_rate"] == 0.5
    assert metrics["rollouts/truncated_token_share"] == 0.75
    assert metrics["rollouts/length"] == 20
    assert metrics["rollouts/length_budget"] == 30
    assert metrics["rollouts/periodic_tail_rate"] == 0.5
    assert metrics["staleness/max"] == 2
    assert metrics["staleness/mean"] == pytest.approx(4 - (10 * 3.0 + 30 * 2.5) / 40)


def test_without_student_rollouts_there_is_nothing_to_say():
    assert rollout_metrics([], version=0, budget=30) == {}
