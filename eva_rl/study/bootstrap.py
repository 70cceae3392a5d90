"""Statistics over many runs: a run counts as one number, and runs of several seeds as draws of their task.

Intervals are stratified bootstraps (Agarwal et al. 2021, arXiv 2108.13264): runs are drawn again within each task. Every task
counts the same, whatever the number of its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from eva_rl.run.intervals import Estimate

DRAWS = 2000
"""Bootstrap samples of an interval, and exchanges of a permutation test."""

Runs = Mapping[str, Sequence[float] | np.ndarray]
"""Each task's scores, one for each run. Two methods that are compared have theirs in the same order of seeds."""
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(scores (..., n), weights (n,)) -> (...)."""


def average(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of scores (..., n)."""
    return np.average(scores, axis=-1, weights=weights)


def interquartile_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the scores (..., n), by weight.

    Scores at the ends of that half count by the part that lies within.
    """
    order = np.argsort(scores, -1, kind="stable")
    ends = np.cumsum(weights[order], -1)  # (..., n): the share of weight up to and with each score
    ends = np.concatenate([np.zeros_like(ends[..., :1]), ends], -1) / weights.sum()
    within = np.diff(np.clip(ends, 0.25, 0.75), axis=-1)  # how much of each score lies in the middle half
    return (np.take_along_axis(scores, order, -1) * within).sum(-1) / within.sum(-1)


def stratified(runs: Runs, statistic: Statistic = average, seed: int = 0) -> Estimate:
    """A statistic of all runs and its interval, to which tasks of fewer than two runs add no width.

    A bootstrap of n runs has a spread that is too small by the square root of (n - 1) / n. Its percentiles are those of
    a normal distribution, where a spread of so few degrees of freedom asks for Student's. Deviations are scaled up by
    both factors. The degrees of freedom are those of the sum of the tasks' variances (Welch 1947). Tasks that all runs
    solve contribute none.
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


def _student(variances: Sequence[np.floating], freedoms: Sequence[int]) -> float:
    """How much wider Student's interval is than a normal's for a sum of estimates of these variances and degrees of freedom."""
    import scipy.stats  # half a second to import

    terms = sum(v**2 / freedom for v, freedom in zip(variances, freedoms, strict=True) if freedom)
    if not terms:
        return 1.0
    return float(scipy.stats.t.ppf(0.975, sum(variances) ** 2 / terms) / scipy.stats.norm.ppf(0.975))


def difference(runs: Runs, others: Runs, seed: int = 0) -> Estimate:
    """How much higher one method's runs score than the other's of the same task and seed, the mean over tasks, and its interval.

    Runs of one task and seed share demonstrations and goals: what these do to both methods is no part of their difference.

    Raises:
        ValueError: if the runs are not in pairs.
    """
    return stratified({task: x - y for task, x, y in _pairs(runs, others)}, seed=seed)


def probability_of_improvement(runs: Runs, others: Runs, seed: int = 0) -> Estimate:
    """How likely a run of one method is to score more than the other's of the same task and seed, the mean over tasks.

    Ties count half. The interval is `stratified`'s, within 0 and 1. There is none where all pairs on each task compare
    alike: such runs don't say how far the probability may be from what they show.

    Raises:
        ValueError: if the runs are not in pairs.
    """
    wins = {task: _wins(x, y) for task, x, y in _pairs(runs, others)}
    found = stratified(wins, seed=seed)
    if found.low is None or found.high is None or not any(np.ptp(own) for own in wins.values()):
        return replace(found, low=None, high=None)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def permutation_test(runs: Runs, others: Runs, seed: int = 0) -> float:
    """The two-sided p-value of two methods being the same.

    This is how often pairs of runs of one task and seed, each exchanged at random, make a mean difference as large (the
    mean over tasks). Runs are exchanged within their pair alone: demonstrations and goals that are harder for both are
    then noise in neither.

    Raises:
        ValueError: if the runs are not in pairs.
    """
    rng, found, shuffled = np.random.default_rng(seed), 0.0, np.zeros(DRAWS)
    for _, x, y in _pairs(runs, others):
        between = (x - y) / len(x)  # (n,)
        found += between.sum()
        shuffled += rng.choice([-1.0, 1.0], (DRAWS, len(x))) @ between
    as_far = np.abs(shuffled) >= abs(found) - 1e-9
    return float((1 + as_far.sum()) / (1 + DRAWS))


def _pairs(runs: Runs, others: Runs) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Each task with the scores (n,) and (n,) of two methods, those of one seed at the same place."""
    if {task: len(own) for task, own in runs.items()} != {task: len(own) for task, own in others.items()}:
        raise ValueError("The methods were run on other tasks, or not with as many seeds.")
    return [(task, np.asarray(runs[task], float), np.asarray(others[task], float)) for task in sorted(runs)]


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,) whether the first (n,) is larger, with a tie as half a win."""
    return (x > y) + 0.5 * (x == y)
