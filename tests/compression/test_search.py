"""Bisection for `max_drop` on curves that are known."""

import math

import pytest

from hf_condlr.compression.search import BISECTIONS, LEAST, Point, largest_ratio
from hf_condlr.errors import ConfigError


def search(drop_of, max_drop=1.0, most=0.9, unbounded=None):
    tried = []

    def measure(number, ratio):
        assert number == len(tried)
        tried.append(ratio)
        return Point(ratio, 1000, 0.5, drop_of(ratio), 2.0)

    free = None if unbounded is None else lambda ratio: Point(ratio, 1000, 0.5, unbounded, 1e4)
    return *largest_ratio(measure, free, most, max_drop, "accuracy"), tried


@pytest.mark.parametrize("edge", [0.05, 0.3, 0.52, 0.89])
def test_the_largest_ratio_within_the_drop_to_the_width_of_the_last_interval(edge):
    ratio, points, tried = search(lambda ratio: 0.0 if ratio <= edge else 9.0)
    assert edge - 0.9 / 2**BISECTIONS - 1e-3 <= ratio <= edge and ratio in tried
    assert [point.ratio for point in points] == sorted(tried) and len(tried) == 1 + BISECTIONS
    assert tried[0] == LEAST


def test_all_that_were_tried_below_the_answer_fit_and_none_above_though_the_curve_is_no_monotone_one():
    ratio, points, _ = search(lambda ratio: 3 * math.sin(9 * ratio))
    assert all((point.drop <= 1.0) == (point.ratio <= ratio) for point in points)


def test_no_ratio_reaches_the_largest_possible():
    ratio, points, _ = search(lambda ratio: 0.0, most=0.7)
    assert ratio == points[-1].ratio < 0.7 and ratio > 0.7 * (1 - 2**-BISECTIONS) - 1e-3


@pytest.mark.parametrize(
    ("drop", "unbounded", "message"),
    [
        (1.01, None, r"a fall of 1.01 at 0.01, the least that is removed\. Raise max_drop, or exclude_mod"),
        (None, None, "a fall that is not a number at 0.01"),
        (
            math.inf,
            2.0,
            r"a fall of inf .*, and of 2.00 where tau=inf lets layers stay dense\. Raise max_drop, or",
        ),
        (3.0, 0.25, r"a fall of 3.00 .*, and of 0.25 where tau=inf lets layers stay dense\. Leave layers dense: with"),
    ],
)
def test_a_drop_that_is_too_large_everywhere_is_found_at_once(drop, unbounded, message):
    tried = []
    with pytest.raises(ConfigError, match=r"leave a ratio whose accuracy falls by at most 1; received " + message):
        search(lambda ratio: tried.append(ratio) or drop, unbounded=unbounded)
    assert tried == [LEAST]


def test_a_quality_that_is_not_a_number_counts_as_too_low():
    ratio, _, _ = search(lambda ratio: None if ratio > 0.4 else 0.5)
    assert 0.38 < ratio <= 0.4
