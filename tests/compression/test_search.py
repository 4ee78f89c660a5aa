"""Bisection for `max_drop` on curves that are known."""

import math

import pytest

from hf_condlr.compression.search import EVALUATIONS, Point, largest_ratio
from hf_condlr.errors import ConfigError


def search(drop_of, max_drop=1.0, most=0.9):
    tried = []

    def measure(number, ratio):
        assert number == len(tried)
        tried.append(ratio)
        return Point(ratio, 1000, 0.5, drop_of(ratio), 2.0)

    return *largest_ratio(measure, most, max_drop, "accuracy"), tried


@pytest.mark.parametrize("edge", [0.05, 0.3, 0.52, 0.89])
def test_the_largest_ratio_within_the_drop_to_the_width_of_the_last_interval(edge):
    ratio, points, tried = search(lambda ratio: 0.0 if ratio <= edge else 9.0)
    assert edge - 0.9 / 2**EVALUATIONS - 1e-3 <= ratio <= edge and ratio in tried
    assert [point.ratio for point in points] == sorted(tried) and len(tried) == EVALUATIONS


def test_all_that_were_tried_below_the_answer_fit_and_none_above_though_the_curve_is_no_monotone_one():
    ratio, points, _ = search(lambda ratio: 3 * math.sin(9 * ratio))
    assert all((point.drop <= 1.0) == (point.ratio <= ratio) for point in points)


def test_no_ratio_reaches_the_largest_possible():
    ratio, points, _ = search(lambda ratio: 0.0, most=0.7)
    assert ratio == points[-1].ratio < 0.7 and ratio > 0.7 * (1 - 2**-EVALUATIONS) - 1e-3


@pytest.mark.parametrize("drop", [None, math.inf, 1.01])
def test_a_drop_that_is_too_large_everywhere_or_not_a_number(drop):
    with pytest.raises(
        ConfigError, match=r"max_drop must leave a ratio whose accuracy falls by at most 1; received dro"
    ):
        search(lambda ratio: drop)


def test_a_quality_that_is_not_a_number_counts_as_too_low():
    ratio, _, _ = search(lambda ratio: None if ratio > 0.4 else 0.5)
    assert 0.38 < ratio <= 0.4
