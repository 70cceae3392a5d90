"""Statistics over many runs: a run counts as one number, and runs of several seeds as draws of their task.

Intervals are stratified bootstraps (Agarwal et al. 2021, arXiv 2108.13264): runs are drawn again within each task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eva_rl.report.statistics import Estimate

DRAWS = 2000
"""Bootstrap samples of an interval."""

Runs = Mapping[str, Sequence[float]]
"""Each task's scores, a run each."""


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the scores (..., n), those at its ends by the part that lies within."""
    n = scores.shape[-1]
    ends = np.arange(n + 1)
    weights = np.diff(np.clip(ends, n / 4, 3 * n / 4))  # how much of each rank lies in the middle half
    return (np.sort(scores, -1) * weights).sum(-1) / weights.sum()


def average(scores: np.ndarray) -> np.ndarray:
    return scores.mean(-1)


def stratified(runs: Runs, statistic: Callable[[np.ndarray], np.ndarray] = average, seed: int = 0) -> Estimate:
    """A statistic of all runs (..., n) and its interval; tasks of fewer than two runs add no width to it.

    A bootstrap of n runs has a spread too small by the square root of (n - 1) / n, and its percentiles are those of a
    normal where a spread of so few degrees of freedom asks for Student's: deviations are scaled up by both.
    """
    import scipy.stats  # half a second to import

    rng, parts = np.random.default_rng(seed), []
    freedom = sum(len(scores) - 1 for scores in runs.values())
    student = scipy.stats.t.ppf(0.975, freedom) / scipy.stats.norm.ppf(0.975) if freedom else 1.0
    for task in sorted(runs):
        scores = np.asarray(runs[task], float)
        center, n = scores.mean(), len(scores)
        drawn = scores[rng.integers(n, size=(DRAWS, n))]
        parts.append(center + (drawn - center) * np.sqrt(n / max(n - 1, 1)) * student)
    whole = np.concatenate([np.asarray(runs[task], float) for task in sorted(runs)])
    low, high = np.quantile(statistic(np.concatenate(parts, 1)), [0.025, 0.975])
    center = float(statistic(whole))
    if max(len(scores) for scores in runs.values()) < 2:
        return Estimate(center, None, None, len(whole))
    return Estimate(center, min(float(low), center), max(float(high), center), len(whole))  # up to rounding


def probability_of_improvement(runs: Runs, others: Runs, seed: int = 0) -> Estimate:
    """How likely a run of one method scores more than one of another on the same task, the mean over tasks; ties count half.

    Raises:
        ValueError: if the methods were not run on the same tasks.
    """
    if runs.keys() != others.keys():
        raise ValueError("The methods were run on other tasks.")
    rng, drawn, found = np.random.default_rng(seed), [], []
    for task in sorted(runs):
        x, y = np.asarray(runs[task], float), np.asarray(others[task], float)
        found.append(_wins(x, y))
        drawn.append(
            _wins(x[rng.integers(len(x), size=(DRAWS, len(x)))], y[rng.integers(len(y), size=(DRAWS, len(y)))])
        )
    count = sum(map(len, runs.values()))
    if max(map(len, [*runs.values(), *others.values()])) < 2:
        return Estimate(float(np.mean(found)), None, None, count)
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975])
    return Estimate(float(np.mean(found)), float(low), float(high), count)


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The share of pairs of (..., n) and (..., m) in which the first is larger."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-1, -2))
