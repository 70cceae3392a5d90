"""Statistics of studies, on data whose answers are known."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.report.study import interquartile_mean, probability_of_improvement, stratified

TASKS = 10


def runs_of(rng: np.random.Generator, means, seeds: int = 5, spread: float = 0.1) -> dict[str, list[float]]:
    return {f"task-{i}": (mean + spread * rng.standard_normal(seeds)).tolist() for i, mean in enumerate(means)}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12).map(lambda scores: scores * 4))
def test_the_interquartile_mean_is_scipys_trimmed_mean_where_a_quarter_is_whole(scores):
    assert interquartile_mean(np.array(scores)) == pytest.approx(scipy.stats.trim_mean(scores, 0.25), abs=1e-9)


def test_between_whole_quarters_scores_count_by_their_part():
    assert interquartile_mean(np.array([0.0, 1.0, 2.0])) == pytest.approx((0.25 * 0 + 1 + 0.25 * 2) / 1.5)
    assert interquartile_mean(np.array([0.0, 0.0, 1.0, 1.0, 100.0])) == pytest.approx((0.75 * 0 + 1 + 0.75 * 1) / 2.5)


@pytest.mark.parametrize("seeds", [3, 5])
def test_in_a_thousand_draws_the_interval_of_the_mean_holds_the_truth_as_often_as_it_says(seeds):
    rng, means = np.random.default_rng(0), np.linspace(0.2, 0.9, TASKS)
    held = 0
    for _ in range(1000):
        found = stratified(runs_of(rng, means, seeds))
        held += found.low <= means.mean() <= found.high
    assert 930 <= held <= 970


def test_in_a_thousand_draws_the_interval_of_the_interquartile_mean_does():
    rng, means = np.random.default_rng(1), np.full(TASKS, 0.5)
    held = 0
    for _ in range(1000):
        found = stratified(runs_of(rng, means), interquartile_mean)
        held += found.low <= 0.5 <= found.high
    assert 930 <= held <= 970


def test_in_a_thousand_draws_the_interval_of_the_probability_of_improvement_does():
    rng, means, truth = np.random.default_rng(2), np.linspace(0.2, 0.9, TASKS), scipy.stats.norm.cdf(0.5 / np.sqrt(2))
    held = 0
    for _ in range(1000):
        found = probability_of_improvement(runs_of(rng, means + 0.05, 10), runs_of(rng, means, 10))
        held += found.low <= truth <= found.high
    assert 930 <= held <= 970


def test_improvement_is_certain_even_or_impossible():
    low, high = {"a": [0.1, 0.2], "b": [0.3]}, {"a": [0.8, 0.9], "b": [0.4]}
    assert probability_of_improvement(high, low).mean == 1.0
    assert probability_of_improvement(low, high).mean == 0.0
    assert probability_of_improvement(low, low).mean == 0.5
    with pytest.raises(ValueError, match="other tasks"):
        probability_of_improvement(low, {"a": [0.1]})


def test_one_run_a_task_has_no_interval():
    found = stratified({"a": [0.5], "b": [0.7]})
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(0.6), None, None, 2)
