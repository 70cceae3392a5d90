"""Statistics of studies, on data whose answers are known."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.study.bootstrap import (
    average,
    difference,
    interquartile_mean,
    permutation_test,
    probability_of_improvement,
    stratified,
)

TASKS = 10


def runs_of(
    rng: np.random.Generator, means, seeds: int = 5, spreads: float | list[float] = 0.1
) -> dict[str, list[float]]:
    spreads = np.broadcast_to(spreads, len(means))
    return {
        f"task-{i}": (m + s * rng.standard_normal(seeds)).tolist()
        for i, (m, s) in enumerate(zip(means, spreads, strict=True))
    }


def even(scores: np.ndarray) -> np.ndarray:
    return np.full(len(scores), 1 / len(scores))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12).map(lambda scores: np.array(scores * 4)))
def test_the_interquartile_mean_is_scipys_trimmed_mean_where_a_quarter_is_whole(scores):
    assert interquartile_mean(scores, even(scores)) == pytest.approx(scipy.stats.trim_mean(scores, 0.25), abs=1e-9)


def test_between_whole_quarters_scores_count_by_their_part():
    for scores, expected in (([0.0, 1.0, 2.0], 1.0), ([0.0, 0.0, 1.0, 1.0, 100.0], (0.75 * 0 + 1 + 0.75 * 1) / 2.5)):
        assert interquartile_mean(np.array(scores), even(np.array(scores))) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 5)), min_size=1, max_size=12))
def test_a_score_of_twice_the_weight_counts_as_two(pairs):
    scores, weights = (np.array(column, float) for column in zip(*pairs, strict=True))
    repeated = np.repeat(scores, weights.astype(int))
    for statistic in (average, interquartile_mean):
        assert statistic(scores, weights) == pytest.approx(statistic(repeated, even(repeated)), abs=1e-6)


def test_a_task_counts_the_same_whatever_the_number_of_its_runs():
    assert stratified({"a": [1.0] * 9, "b": [0.0]}).mean == pytest.approx(0.5)


@pytest.mark.parametrize("seeds", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_in_a_thousand_draws_the_interval_of_the_mean_holds_the_truth_as_often_as_it_says(seeds):
    rng, means = np.random.default_rng(0), np.linspace(0.2, 0.9, TASKS)
    held = 0
    for _ in range(1000):
        found = stratified(runs_of(rng, means, seeds))
        held += found.low <= means.mean() <= found.high
    assert 930 <= held <= 970


@pytest.mark.parametrize("spreads", [[0] * 9 + [0.1], [0] * 8 + [0.1] * 2, [0] * 5 + [0.02, 0.05, 0.1, 0.2, 0.3]])
def test_it_does_where_most_tasks_are_solved_by_every_run(spreads):
    rng, means, held = np.random.default_rng(6), np.linspace(0.2, 0.9, TASKS), 0
    for _ in range(1000):
        found = stratified(runs_of(rng, means, 3, spreads))
        held += found.low <= means.mean() <= found.high
    assert 930 <= held <= 970


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_in_a_thousand_draws_the_interval_of_the_interquartile_mean_does(seeds):
    rng, means = np.random.default_rng(1), np.full(TASKS, 0.5)
    held = 0
    for _ in range(1000):
        found = stratified(runs_of(rng, means, seeds), interquartile_mean)
        held += found.low <= 0.5 <= found.high
    assert 930 <= held <= 970


@pytest.mark.parametrize(("mean", "seeds"), [(0.2, 3), (0.2, 5), (0.8, 3)])
def test_the_interval_of_one_task_whose_runs_are_skewed_holds_it_in_about_nine_of_ten_draws(mean, seeds):
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        rates = rng.binomial(50, rng.beta(4 * mean, 4 * (1 - mean), seeds)) / 50
        found = stratified({"task": list(rates)})
        held += found.low <= mean <= found.high
    assert 870 <= held <= 930


def paired(
    rng: np.random.Generator, better: float, seeds: int, shared: float, tasks: int = TASKS, noise: float = 0.1
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Runs of two methods, of which the first is so much better, where what each task and seed does to both spreads by `shared`."""
    effects = np.linspace(0.2, 0.9, tasks)[:, None] + shared * rng.standard_normal((tasks, seeds))
    one, other = effects + noise * rng.standard_normal((2, tasks, seeds))
    return ({f"task-{i}": row for i, row in enumerate(rows)} for rows in (one + better, other))


@pytest.mark.parametrize(
    ("seeds", "better", "shared"),
    [(3, 0.05, 0.2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 0.0, 0.0), (10, 0.05, 0.1)])],
)
def test_in_a_thousand_draws_the_intervals_of_what_is_between_two_methods_hold_it(seeds, better, shared):
    rng, held = np.random.default_rng(2), np.zeros(2)
    truths = scipy.stats.norm.cdf(better / 0.1 / np.sqrt(2)), better
    for _ in range(1000):
        runs = list(paired(rng, better, seeds, shared))
        found = probability_of_improvement(*runs), difference(*runs)
        held += [estimate.low <= truth <= estimate.high for estimate, truth in zip(found, truths, strict=True)]
    assert ((held >= 920) & (held <= 980)).all(), held


@pytest.mark.parametrize(
    ("tasks", "seeds", "shared"), [(1, 3, 0.1), (1, 8, 0.2), (3, 3, 0.2), (10, 2, 0.0), (10, 5, 0.2)]
)
def test_methods_that_are_the_same_are_told_apart_no_more_often_than_a_test_at_5_percent_says(tasks, seeds, shared):
    rng = np.random.default_rng(7)
    found = [permutation_test(*paired(rng, 0.0, seeds, shared, tasks)) for _ in range(300)]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    if 2 ** (tasks * seeds) > 500:  # else hardly any exchange is extreme enough
        assert np.mean(np.array(found) <= 0.05) >= 0.05 - 3 * np.sqrt(0.05 * 0.95 / 300)


def test_what_seeds_do_to_both_methods_costs_the_test_no_power():
    # Of a paired Student's test on 50 differences of standard deviation 0.1 * sqrt(2) the power at 0.05 is about 0.69.
    power = {
        shared: np.mean([permutation_test(*paired(rng, 0.05, 5, shared)) <= 0.05 for _ in range(300)])
        for shared, rng in ((shared, np.random.default_rng(5)) for shared in (0.0, 0.1, 0.2))
    }
    expected = 1 - scipy.stats.nct.cdf(scipy.stats.t.ppf(0.975, 49), 49, 0.05 / (0.1 * np.sqrt(2)) * np.sqrt(50))
    for found in power.values():
        assert found == pytest.approx(expected, abs=0.08)


def test_methods_of_which_one_is_always_better_are_told_apart():
    rng, means = np.random.default_rng(5), np.linspace(0.2, 0.9, TASKS)
    assert permutation_test(runs_of(rng, means + 1.0), runs_of(rng, means)) < 0.001
    assert permutation_test(same := runs_of(rng, means), same) == 1.0


def test_improvement_is_certain_even_or_impossible():
    low, high = {"a": [0.1, 0.2], "b": [0.3]}, {"a": [0.8, 0.9], "b": [0.4]}
    assert probability_of_improvement(high, low).mean == 1.0
    assert probability_of_improvement(low, high).mean == 0.0
    assert probability_of_improvement(low, low).mean == 0.5
    assert probability_of_improvement(high, low).low is None
    for others in ({"a": [0.1]}, {"a": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="other tasks"):
            probability_of_improvement(low, others)


def test_runs_are_compared_with_those_of_the_same_seed():
    # Each run is better than its pair by 0.1, and worse than half of the others.
    runs = {"a": [0.2, 0.5, 0.8]}, {"a": [0.1, 0.4, 0.7]}
    assert probability_of_improvement(*runs).mean == 1.0
    found = difference(*runs)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_run_a_task_has_no_interval():
    found = stratified({"a": [0.5], "b": [0.7]})
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(0.6), None, None, 2)
