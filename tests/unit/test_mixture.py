"""Schedules, and what a step consists of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.buffer.mixture import Mixture, StepMix
from opd_ray.config import from_dict, schedule
from opd_ray.messages import ScoreRequest, Strength
from opd_ray.score.requests import roles_of, score_requests


def test_a_schedule_is_straight_between_its_points_and_constant_outside():
    points = ((10, 1.0), (20, 0.0))
    assert [schedule.at(points, step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert (schedule.highest(points), schedule.lowest(points)) == (1.0, 0.0)
    assert schedule.at(0.3, 5) == schedule.highest(0.3) == schedule.lowest(0.3) == 0.3


@given(number=st.integers(0, 30), num_prompts=st.integers(1, 12))
def test_what_the_teacher_writes_is_spread_evenly_over_the_prompts(number, num_prompts):
    mix = StepMix(student_per_prompt=1, num_teacher_written=number, num_golden=0)
    counts = [mix.teacher_written(index, num_prompts) for index in range(num_prompts)]
    assert sum(counts) == number
    assert max(counts) - min(counts) <= 1


def test_the_default_step_is_stableopds():
    mixture = Mixture(from_dict({}))
    assert mixture.at(7) == StepMix(student_per_prompt=1, num_teacher_written=0, num_golden=32)
    coefficients = mixture.coefficients(7)
    assert (coefficients.student, coefficients.golden, coefficients.reference) == (0.25, 0.75, 0.025)


def test_the_guard_raises_what_is_configured_and_never_lowers_it():
    mixture = Mixture(from_dict({"buffer": {"golden_per_prompt": 0.5}}))
    weak, strong = Strength(0.1, 0.1, 0.001), Strength(2.0, 3.0, 0.1, mask_truncated_tails=True)
    assert mixture.at(0, weak) == mixture.at(0)
    assert mixture.coefficients(0, weak) == mixture.coefficients(0)
    assert mixture.at(0, strong).num_golden == 64
    assert mixture.coefficients(0, strong).golden == 3.0
    assert mixture.coefficients(0, strong).reference == 0.1
    assert mixture.coefficients(0, strong).mask_truncated_tails


def test_a_resumed_run_draws_the_same_steps_on_policy():
    config = {"buffer": {"on_policy_probability": [[0, 1.0], [100, 0.0]]}}
    first, second = Mixture(from_dict(config)), Mixture(from_dict(config))
    drawn = [first.at(step).student_per_prompt for step in range(100)]
    assert drawn[50:] == [second.at(step).student_per_prompt for step in range(50, 100)]
    assert sum(drawn[:20]) > 14 and sum(drawn[80:]) < 6


TERMS = [
    ({"divergence": "k1"}, ScoreRequest(stop_token_ids=(1, 2))),
    ({"divergence": "forward_kl", "top_k": 5}, ScoreRequest(top_k=5, stop_token_ids=(1, 2))),
    ({"support": "student_top_k", "top_k": 5}, ScoreRequest(top_k=5, given=True, stop_token_ids=(1, 2))),
    ({"support": "full"}, ScoreRequest(hidden=True, stop_token_ids=(1, 2))),
]


@pytest.mark.parametrize(("term", "request_"), TERMS)
def test_a_teacher_is_asked_for_what_the_divergence_needs(term, request_):
    requests = score_requests(from_dict({"loss": {"student": term}}), (1, 2))
    assert requests["student"]["teacher"] == request_
    assert requests["golden"] == {}, "cross-entropy compares with nobody"


def test_a_routed_rollout_asks_its_own_teacher_and_a_weighted_one_all():
    raw = {"more_teachers": {"code": {}}}
    routed = from_dict(raw)
    requests = score_requests(routed, (1,))["student"]
    assert roles_of(routed, requests, "code").keys() == {"code", "reference"}
    weighted = from_dict(raw | {"loss": {"teachers": "weighted"}})
    assert roles_of(weighted, requests, "code").keys() == {"teacher", "code", "reference"}


def test_extrapolation_needs_the_reference_even_without_its_kl():
    raw = {
        "loss": {
            "student": {"divergence": "k1"},
            "advantage": {"extrapolation": 1.25},
            "reference": {"coef": 0},
        }
    }
    assert score_requests(from_dict(raw), (1,))["student"].keys() == {"teacher", "reference"}
