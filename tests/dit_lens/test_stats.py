"""Intervals cover what they say: exact coverage where it can be summed, simulated where not, at the sizes that recipes use."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom, binomtest, multinomial
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from dit_lens import stats

SIZES = (8, 24, 64, 128)
COVERS = 0.93


def covers(interval: np.ndarray, truth: float) -> np.ndarray:
    return (interval[..., 1] <= truth) & (truth <= interval[..., 2])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_a_mean_is_covered(n, kind):
    rng = np.random.default_rng(n)
    draws = rng.normal(size=(4000, n, 1)) if kind == "normal" else rng.beta(3, 6, size=(4000, n, 1))
    assert covers(stats.clustered_means(draws), 0.0 if kind == "normal" else 1 / 3).mean() >= COVERS


@pytest.mark.parametrize("n", SIZES)
def test_a_mean_of_clusters_of_unequal_size_is_covered(n):
    rng = np.random.default_rng(n)
    draws = rng.normal(size=(3000, n, 1)) + rng.normal(size=(3000, n, 4))
    draws[:, ::3, 2:] = np.nan
    assert covers(stats.clustered_means(draws), 0.0).mean() >= COVERS


@pytest.mark.parametrize("n", SIZES)
def test_a_proportion_is_covered_exactly(n):
    hits = np.arange(n + 1)
    intervals = np.array([stats.proportion(np.repeat([1.0, 0.0], [h, n - h])) for h in hits])
    coverage = [binom.pmf(hits, n, p)[covers(intervals, p)].sum() for p in np.arange(0.02, 0.99, 0.01)]
    assert np.mean(coverage) >= 0.945
    assert np.quantile(coverage, 0.1) >= 0.925
    for p in (0.03, 0.1, 0.25, 0.5, 0.9):
        assert binom.pmf(hits, n, p)[covers(intervals, p)].sum() >= 0.929
    for h in (0, n):
        exact = binomtest(h, n).proportion_ci(method="exact")
        assert intervals[h, 1:] == pytest.approx([exact.low, exact.high])


@pytest.mark.parametrize("n", [8, 24, 64])
@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.05), (0.05, 0.1), (0.3, 0.02), (0.25, 0.25), (0.0, 0.6)])
def test_a_paired_difference_of_verdicts_is_covered_exactly(n, gained, lost):
    coverage = 0.0
    for up, down in itertools.product(range(n + 1), repeat=2):
        chance = multinomial.pmf([up, down, n - up - down], n, [gained, lost, 1 - gained - lost]) if up + down <= n else 0
        if chance > 1e-9:
            _, low, high = stats.paired_proportions((up - down) / n, (up + down) / n, n)
            coverage += chance * (low <= gained - lost <= high)
    assert coverage >= COVERS


@pytest.mark.parametrize("n", [24, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_verdicts_with_repeats_are_covered(n, signed):
    rng = np.random.default_rng(n)

    def verdicts() -> np.ndarray:
        return (rng.random((3000, n, 4)) < rng.beta(0.6, 1.4, size=(3000, n, 1))).astype(float)  # mean .3, alike in a cluster

    values = verdicts() - verdicts() if signed else verdicts()
    assert covers(stats.clustered_means(values, signed), 0.0 if signed else 0.3).mean() >= COVERS


def test_a_paired_difference_is_the_formula_of_the_counts():
    before, after = np.array([1, 1, 1, 1, 0, 0, 0, 1.0]), np.array([0, 0, 0, 1, 0, 1, 0, 1.0])
    found = stats.paired_difference(before[:, None], after[:, None])
    n, b, c = 10, 1.5, 3.5  # half a thing in each of four cells
    half = 1.959964 * np.sqrt((b + c) / n - ((b - c) / n) ** 2) / np.sqrt(n)
    assert found == pytest.approx((-0.25, -0.2 - half, -0.2 + half), abs=1e-5)


def test_no_interval_is_of_zero_width_but_that_of_a_finite_population():
    never = np.zeros((64, 1))
    assert stats.clustered_mean(never)[1:] == pytest.approx(proportion_confint(0, 64, method="beta"))
    low, high = stats.paired_difference(never + 1, never + 1)[1:]
    assert low == -high == pytest.approx(-1.959964 / 66, rel=1e-5)
    assert stats.paired_difference(never + 0.9, never + 0.9) == (0, 0, 0)  # numbers, not verdicts: nothing varies
    assert str(stats.finite(18)) == "18.000"
    assert np.isnan(stats.clustered_mean(np.array([[0.3, 0.4]]))[1:]).all()


def test_continuous_repeats_are_students_interval_of_cluster_means():
    values = np.random.default_rng(0).normal(size=(12, 5))
    means = values.mean(axis=1)
    half = student.ppf(0.975, 11) * means.std(ddof=1) / np.sqrt(12)
    assert stats.clustered_mean(values) == pytest.approx((means.mean(), means.mean() - half, means.mean() + half))
