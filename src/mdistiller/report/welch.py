"""Welch's t-test and confidence intervals of a mean, for a few values each."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Welch(NamedTuple):
    """Result of Welch's test: statistic t, degrees of freedom, two-sided p."""

    t: float
    degrees: float
    p: float


def welch(one: Sequence[float], other: Sequence[float]) -> Welch | None:
    """Tests whether two samples have the same mean, without assuming the same variance (Welch, 1947).

    Returns None where no test is possible: a sample of one value, or two samples without any spread.
    """
    if min(len(one), len(other)) < 2:
        return None
    a, b = (statistics.variance(values) / len(values) for values in (one, other))
    if a + b == 0:
        return None
    t = (statistics.fmean(one) - statistics.fmean(other)) / math.sqrt(a + b)
    degrees = (a + b) ** 2 / (a**2 / (len(one) - 1) + b**2 / (len(other) - 1))
    return Welch(t, degrees, student_p(t, degrees))


def student_p(t: float, degrees: float) -> float:
    """Computes the two-sided tail probability of Student's t distribution."""
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Computes half the width of the confidence interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    degrees, low, high = len(values) - 1, 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, degrees) > 1 - confidence else (low, middle)
    return high * statistics.stdev(values) / math.sqrt(len(values))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Computes the regularised incomplete beta function I_x(a, b) by a continued fraction.

    Equation 8.17.22 of the Digital Library of Mathematical Functions, by Lentz's method (1976).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this point
        return 1 - incomplete_beta(b, a, 1 - x)
    c, d, fraction = 1.0, 0.0, 1.0
    for n in range(1, 1000):
        k = n // 2
        if n % 2:
            term = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        else:
            term = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        c, d = 1 + term / c, 1 / (1 + term * d)
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / fraction
