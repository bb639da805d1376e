"""Intervals against published values."""

import numpy as np
import pytest

from sdd_lora.measures.intervals import (
    bootstrap_maximum,
    bootstrap_mean,
    expected_maximum,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I: Wilson score, no continuity correction
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_images_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_paired_difference_counts_only_pairs_that_changed():
    before = [True] * 80 + [False] * 20
    after = [True] * 70 + [False] * 10 + [True] * 5 + [False] * 15
    difference, low, high = paired_difference(before, after)
    assert difference == pytest.approx(-0.05)
    assert low < -0.05 < high < 0.05
    assert paired_difference(before, before)[0] == 0


def test_the_bootstrap_of_a_mean_is_the_normal_interval_for_many_values_and_seeded():
    values = np.random.default_rng(3).normal(10, 2, 400).tolist()
    low, high = bootstrap_mean(values)
    half = 1.96 * np.std(values, ddof=1) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)
    assert bootstrap_mean(values) == (low, high) != bootstrap_mean(values, seed=1)
    assert bootstrap_mean([3.0, 3.0]) == (3.0, 3.0)


def test_the_expected_maximum_has_a_closed_form():
    rates = [0.0] * 99 + [1.0]  # one bad prompt in a hundred: is it among 25?
    expected = 1 - 0.99**25
    assert expected_maximum(rates) == pytest.approx(expected, abs=0.02)
    assert expected_maximum(rates) == expected_maximum(rates) != expected_maximum(rates, seed=1)
    low, high = bootstrap_maximum(rates)
    assert low == 0 and high == pytest.approx(1 - 0.97**25)  # 3 of 100: that quantile of a binomial
    assert expected_maximum([0.3] * 5) == pytest.approx(0.3)
    assert bootstrap_maximum([0.3] * 5) == pytest.approx((0.3, 0.3))
