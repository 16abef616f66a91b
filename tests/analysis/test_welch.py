"""Welch's test and intervals against scipy, which scikit-learn brings."""

import numpy as np
import pytest

from mdistiller.report.welch import half_width, incomplete_beta, student_p, welch

stats = pytest.importorskip("scipy.stats")


def test_equals_scipy():
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes, scale = random.integers(2, 12, 2), random.uniform(0.01, 5, 2)
        one = random.normal(random.choice([0, 0, 2, 30]), scale[0], sizes[0]).tolist()
        other = random.normal(0, scale[1], sizes[1]).tolist()
        found, expected = welch(one, other), stats.ttest_ind(one, other, equal_var=False)
        assert found.t == pytest.approx(expected.statistic, rel=1e-9)
        assert found.degrees == pytest.approx(expected.df, rel=1e-9)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_known_values():
    """Student's t: Cauchy's tail for one degree of freedom, and the table's 2.776 for four."""
    assert student_p(1.0, 1) == pytest.approx(0.5, rel=1e-12)
    assert student_p(2.776445, 4) == pytest.approx(0.05, rel=1e-6)
    assert (incomplete_beta(2, 3, 0), incomplete_beta(2, 3, 1)) == (0, 1)


def test_intervals_equal_scipys():
    for values in ([1.0, 2.0], [1.0, 2.0, 4.0], [96.1, 95.2, 96.9, 97.0, 95.5]):
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-9)
    assert half_width([3.0]) is None


@pytest.mark.parametrize(
    ("one", "other"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0]), ([1.0, 1.0], [2.0, 2.0])]
)
def test_no_test_is_possible(one, other):
    assert welch(one, other) is None
