"""Welch's test and intervals against closed forms and scipy's own functions on the values."""

import math

import numpy as np
import pytest
from scipy import stats

from mdistiller.report.spread import half_width, welch_p


def test_equals_scipy():
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes, scale = random.integers(2, 12, 2), random.uniform(0.01, 5, 2)
        one = random.normal(random.choice([0, 0, 2, 30]), scale[0], sizes[0]).tolist()
        other = random.normal(0, scale[1], sizes[1]).tolist()
        expected = stats.ttest_ind(one, other, equal_var=False).pvalue
        assert welch_p(one, other) == pytest.approx(expected, rel=1e-9)


def test_closed_forms():
    """Student's t of one degree of freedom is Cauchy's; of two, p = 1 - t / sqrt(2 + t²)."""
    # A sample without spread leaves the other's single degree of freedom: t = 4 / 1, then t = 1 / 1.
    assert welch_p([1.0, 1.0], [4.0, 6.0]) == pytest.approx(1 - 2 / math.pi * math.atan(4), rel=1e-12)
    assert welch_p([1.0, 3.0], [1.0, 1.0]) == pytest.approx(0.5, rel=1e-12)
    # Two pairs of the same spread have two: t = 3 / sqrt(2).
    t = 3 / math.sqrt(2)
    assert welch_p([0.0, 2.0], [3.0, 5.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)


def test_the_width_of_known_intervals():
    """Cauchy's quantile for one degree of freedom, and the table's 2.776 for four."""
    assert half_width([1.0, 3.0]) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    assert half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert half_width([1.0, 3.0], 0.5) == pytest.approx(1, rel=1e-9)


def test_intervals_equal_scipys():
    for values in ([1.0, 2.0], [1.0, 2.0, 4.0], [96.1, 95.2, 96.9, 97.0, 95.5]):
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-9)
    assert half_width([3.0]) is None


@pytest.mark.parametrize(
    ("one", "other"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0]), ([1.0, 1.0], [2.0, 2.0])]
)
def test_no_test_is_possible(one, other):
    assert welch_p(one, other) is None
