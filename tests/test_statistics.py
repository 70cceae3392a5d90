"""Confidence intervals against published values, and against how often they hold the truth."""

import math

import numpy as np
import pytest
import scipy.stats

from eva_rl.run.intervals import Estimate, mean, proportion


def trials(successes: int, n: int) -> list[bool]:
    return [True] * successes + [False] * (n - successes)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3 (Wilson's score without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    estimate = proportion(trials(successes, n))
    assert estimate.mean == successes / n
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
    assert estimate.n == n


@pytest.mark.parametrize("n", [1, 10, 20])
def test_wilson_at_none_and_at_all_is_closed_form_and_symmetric(n):
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    none, every = proportion(trials(0, n)), proportion(trials(n, n))
    assert (none.mean, none.low) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert none.high == pytest.approx(z2 / (n + z2))
    assert (every.mean, every.high) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert every.low == pytest.approx(n / (n + z2))
    for estimate in (none, every):
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1


def test_student_interval_is_that_of_the_sleep_data():
    # Student (1908), Biometrika 6: extra hours of sleep, ten patients. R: t.test(extra, ...) gives 0.7001142 2.4598858
    estimate = mean([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert estimate.mean == pytest.approx(1.58)
    assert (estimate.low, estimate.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert estimate.n == 10


def test_one_value_has_a_mean_and_no_interval():
    assert mean([3.5]) == Estimate(3.5, None, None, 1)


def test_equal_values_have_an_interval_of_no_width():
    assert mean([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_student_intervals_hold_the_true_mean_in_95_of_100_samples(n):
    samples = np.random.default_rng(n).normal(3.0, 2.0, (4000, n))
    hits = [e.low <= 3.0 <= e.high for e in map(mean, samples)]
    assert 0.93 < np.mean(hits) < 0.97


@pytest.mark.parametrize("n", [10, 20, 50])
def test_wilson_intervals_hold_the_true_share_in_95_of_100_samples_on_average(n):
    intervals = [proportion(trials(k, n)) for k in range(n + 1)]
    low, high = np.array([e.low for e in intervals]), np.array([e.high for e in intervals])
    coverage = [
        scipy.stats.binom.pmf(np.arange(n + 1), n, share) @ ((low <= share) & (share <= high))
        for share in np.linspace(0.02, 0.98, 193)
    ]
    assert 0.94 < np.mean(coverage) < 0.97
    assert min(coverage) > 0.8


def test_estimates_are_plain_numbers_from_lists_and_arrays_alike():
    for estimate in (proportion(np.array([True, False])), proportion([1, 0]), mean(np.float32([1, 2])), mean([1, 2])):
        assert [type(v) for v in (estimate.mean, estimate.low, estimate.high, estimate.n)] == [float, float, float, int]
        assert all(math.isfinite(v) for v in (estimate.mean, estimate.low, estimate.high))


def test_estimates_print_with_their_interval():
    assert str(Estimate(0.5, 0.25, 0.75, 10)) == "0.50 [0.25, 0.75]"
    assert str(Estimate(0.5, None, None, 1)) == "0.50"
