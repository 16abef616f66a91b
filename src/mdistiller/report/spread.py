"""Mean, spread and tests over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanStd:
    """Mean over seeds, and sample standard deviation (n - 1), which is None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanStd:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if self.std is None else f"{mean} ± {format(self.std, spec)}"

    def __str__(self) -> str:
        return format(self, ".2f")


def welch_p(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Computes Welch's two-sided p; None where a sample has one value, or both have no spread."""
    if min(len(one), len(other)) < 2:
        return None
    samples = [(statistics.fmean(values), statistics.stdev(values), len(values)) for values in (one, other)]
    if not any(std for _, std, _ in samples):
        return None
    from scipy.stats import ttest_ind_from_stats  # takes a second to load

    return float(ttest_ind_from_stats(*samples[0], *samples[1], equal_var=False).pvalue)


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Computes half the width of the confidence interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
