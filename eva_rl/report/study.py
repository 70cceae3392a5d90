"""Statistics over many runs: a run counts as one number, and runs of several seeds as draws of their task.

Intervals are stratified bootstraps (Agarwal et al. 2021, arXiv 2108.13264): runs are drawn again within each task. Every task
counts the same, whatever the number of its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eva_rl.report.statistics import Estimate

DRAWS = 2000
"""Bootstrap samples of an interval, and shuffles of a permutation test."""

Runs = Mapping[str, Sequence[float]]
"""Each task's scores, a run each."""
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(scores (..., n), weights (n,)) -> (...)."""


def average(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of scores (..., n)."""
    return np.average(scores, axis=-1, weights=weights)


def interquartile_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the scores (..., n), by weight; those at its ends by the part that lies within."""
    order = np.argsort(scores, -1, kind="stable")
    ends = np.cumsum(weights[order], -1)  # (..., n): the share of weight up to and with each score
    ends = np.concatenate([np.zeros_like(ends[..., :1]), ends], -1) / weights.sum()
    within = np.diff(np.clip(ends, 0.25, 0.75), axis=-1)  # how much of each score lies in the middle half
    return (np.take_along_axis(scores, order, -1) * within).sum(-1) / within.sum(-1)


def stratified(runs: Runs, statistic: Statistic = average, seed: int = 0) -> Estimate:
    """A statistic of all runs and its interval; tasks of fewer than two runs add no width to it.

    A bootstrap of n runs has a spread too small by the square root of (n - 1) / n, and its percentiles are those of a
    normal where a spread of so few degrees of freedom asks for Student's: deviations are scaled up by both. The degrees of
    freedom are those of the sum of the tasks' variances (Welch 1947): tasks that all runs solve contribute none.
    """
    rng, parts = np.random.default_rng(seed), []
    several = [scores for scores in runs.values() if len(scores) > 1]
    student = _student([np.var(s, ddof=1) / len(s) for s in several], [len(s) - 1 for s in several])
    for task in sorted(runs):
        scores = np.asarray(runs[task], float)
        center, n = scores.mean(), len(scores)
        drawn = scores[rng.integers(n, size=(DRAWS, n))]
        parts.append(center + (drawn - center) * np.sqrt(n / max(n - 1, 1)) * student)
    whole = np.concatenate([np.asarray(runs[task], float) for task in sorted(runs)])
    weights = np.concatenate([np.full(len(runs[task]), 1 / len(runs[task])) for task in sorted(runs)])
    center = float(statistic(whole, weights))
    if max(len(scores) for scores in runs.values()) < 2:
        return Estimate(center, None, None, len(whole))
    low, high = np.quantile(statistic(np.concatenate(parts, 1), weights), [0.025, 0.975])
    return Estimate(center, min(float(low), center), max(float(high), center), len(whole))  # up to rounding


def _student(variances: Sequence[float], freedoms: Sequence[int]) -> float:
    """How much wider Student's interval is than a normal's for a sum of estimates of these variances and degrees of freedom."""
    import scipy.stats  # half a second to import

    terms = sum(v**2 / freedom for v, freedom in zip(variances, freedoms, strict=True) if freedom)
    if not terms:
        return 1.0
    return float(scipy.stats.t.ppf(0.975, sum(variances) ** 2 / terms) / scipy.stats.norm.ppf(0.975))


def probability_of_improvement(runs: Runs, others: Runs, seed: int = 0) -> Estimate:
    """How likely a run of one method scores more than one of another on the same task, the mean over tasks; ties count half.

    The interval is a bootstrap's with the spread of an unbiased estimate of the variance, widened to Student's. Where that
    estimate is 0, as where all runs of one method are above all of the other, it has none: such runs don't say how far the
    probability may be from 0 or 1.

    Raises:
        ValueError: if the methods were not run on the same tasks.
    """
    rng, found, drawn, variances, freedoms = np.random.default_rng(seed), [], [], [], []
    for x, y in _pairs(runs, others):
        found.append(_wins(x, y).mean())
        again = _wins(x[rng.integers(len(x), size=(DRAWS, len(x)))], y[rng.integers(len(y), size=(DRAWS, len(y)))])
        drawn.append(again.mean((-1, -2)))
        variances.append(_variance(_wins(x, y)))
        freedoms.append(len(x) + len(y) - 2)
    center, count = float(np.mean(found)), sum(map(len, runs.values()))
    if not any(variances):
        return Estimate(center, None, None, count)
    spread = np.mean(np.array(drawn) - np.array(found)[:, None], 0)
    spread *= np.sqrt(sum(variances) / spread.var()) / len(found) * _student(variances, freedoms)
    low, high = np.clip(center + np.quantile(spread, [0.025, 0.975]), 0, 1)
    return Estimate(center, min(float(low), center), max(float(high), center), count)


def _variance(wins: np.ndarray) -> float:
    """The variance of the mean of (n, m) comparisons: its square less the mean product of those that share no run."""
    n, m = wins.shape
    if min(n, m) < 2:
        return 0.0
    apart = wins.sum() ** 2 - (wins.sum(1) ** 2).sum() - (wins.sum(0) ** 2).sum() + (wins**2).sum()
    return max(wins.mean() ** 2 - apart / (n * (n - 1) * m * (m - 1)), 0.0)


def permutation_test(runs: Runs, others: Runs, seed: int = 0) -> float:
    """The two-sided p-value of two methods being the same: how often runs shuffled between them within each task make a
    probability of improvement as far from a half.

    Raises:
        ValueError: if the methods were not run on the same tasks.
    """
    rng, found, shuffled = np.random.default_rng(seed), [], []
    for x, y in _pairs(runs, others):
        found.append(_wins(x, y).mean())
        both = rng.permuted(np.tile(np.concatenate([x, y]), (DRAWS, 1)), axis=1)  # (draws, n + m)
        shuffled.append(_wins(both[:, : len(x)], both[:, len(x) :]).mean((-1, -2)))
    as_far = np.abs(np.mean(shuffled, 0) - 0.5) >= abs(np.mean(found) - 0.5) - 1e-9
    return float((1 + as_far.sum()) / (1 + DRAWS))


def _pairs(runs: Runs, others: Runs) -> list[tuple[np.ndarray, np.ndarray]]:
    """The scores of two methods, a task each."""
    if runs.keys() != others.keys():
        raise ValueError("The methods were run on other tasks.")
    return [(np.asarray(runs[task], float), np.asarray(others[task], float)) for task in sorted(runs)]


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """For each pair of (..., n) and (..., m) whether the first is larger, (..., n, m); a tie is half a win."""
    x, y = x[..., :, None], y[..., None, :]
    return (x > y) + 0.5 * (x == y)
