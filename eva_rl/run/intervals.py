"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over n episodes and its 95 % confidence interval (None where n = 1 gives none)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.low is None else f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def proportion(successes: Sequence[bool] | np.ndarray) -> Estimate:
    """The share of successes with Wilson's score interval (Wilson 1927), which is right at 0 and 1 too."""
    import scipy.stats  # half a second to import

    result = scipy.stats.binomtest(int(np.sum(successes)), len(successes))
    interval = result.proportion_ci(0.95, method="wilson")
    return Estimate(float(result.statistic), float(interval.low), float(interval.high), len(successes))


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean with Student's t interval."""
    values = np.asarray(values, float)
    center, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(center, None, None, 1)
    import scipy.stats

    half = float(scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Estimate(center, center - half, center + half, n)
