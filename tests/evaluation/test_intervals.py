"""Intervals against published values."""

import pytest

from sdd_lora.evaluation.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I: Wilson score, no continuity correction
    [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
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
