"""Tests on seeds: the sign-flip test against all of its flips, and intervals that hold what they promise."""

import itertools
import math

import numpy as np
import pytest

from opd_ray.report.uncertainty import location, over_problems, proportion


@pytest.mark.parametrize("limit", [-0.1, 0.0, 0.05, 0.3])
def test_the_p_value_is_the_share_of_sign_flips_that_are_as_far_off(limit):
    values = np.random.default_rng(1).normal(0.1, 0.15, 8)
    flips = [np.mean((values - limit) * signs) for signs in itertools.product([1, -1], repeat=8)]
    off = abs(np.mean(values - limit)) - 1e-12
    assert location(values, limit).p == pytest.approx(np.mean(np.abs(flips) >= off))


def test_the_interval_is_what_the_test_does_not_reject():
    values = np.random.default_rng(2).normal(0.1, 0.15, 10)
    found = location(values)
    for edge, outwards in ((found.low, -1), (found.high, 1)):
        assert location(values, edge + outwards * 1e-6).p <= 0.05 < location(values, edge - outwards * 1e-6).p


def test_the_interval_covers_the_centre_as_often_as_it_says():
    draws = np.random.default_rng(3).laplace(0.2, 0.1, (400, 10))
    covered = sum(found.low <= 0.2 <= found.high for found in map(location, draws))
    assert 0.92 <= covered / 400 <= 0.98


def test_five_values_have_no_interval_however_clear_they_are():
    assert location([0.3] * 5).low == -math.inf and location([0.3] * 5).p == pytest.approx(2 / 32)
    assert location([0.3] * 6).low == pytest.approx(0.3)


def test_differences_that_are_their_limit_but_for_the_last_digit_are_at_it():
    assert location([0.3 - 0.2] * 10, 0.1).p == 1 and 0.3 - 0.2 < 0.1


def test_many_seeds_are_drawn_from_not_enumerated():
    values = np.random.default_rng(4).normal(0.1, 0.1, 40)
    found = location(values)
    assert found.low == pytest.approx(np.mean(values) - 2 * np.std(values, ddof=1) / math.sqrt(40), abs=0.01)


def test_a_proportion_has_the_binomial_tests_p_and_clopper_and_pearsons_interval():
    found = proportion(8, 10)
    assert found.p == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert (found.low, found.high) == (pytest.approx(0.4439, abs=1e-4), pytest.approx(0.9748, abs=1e-4))
    assert (proportion(0, 10).low, proportion(10, 10).high) == (0, 1)


def test_the_error_over_problems_is_of_their_means_over_seeds():
    answers = np.array([[1, 0, 1, 1], [1, 0, 0, 1]], float)
    assert over_problems(answers) == pytest.approx(np.std([1, 0, 0.5, 1], ddof=1) / 2)
