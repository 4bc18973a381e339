"""Intervals cover what they say: exact coverage where it can be summed, simulated where not, at the
sizes that recipes use.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, multinomial, norm, spearmanr
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests
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
    coverage = [
        binom.pmf(hits, n, p)[covers(intervals, p)].sum() for p in np.arange(0.02, 0.99, 0.01)
    ]
    assert np.mean(coverage) >= 0.945
    assert np.quantile(coverage, 0.1) >= 0.925
    for p in (0.03, 0.1, 0.25, 0.5, 0.9):
        assert binom.pmf(hits, n, p)[covers(intervals, p)].sum() >= 0.929
    for h in (0, n):
        exact = binomtest(h, n).proportion_ci(method="exact")
        assert intervals[h, 1:] == pytest.approx([exact.low, exact.high])


@pytest.mark.parametrize("n", [8, 24, 64])
@pytest.mark.parametrize(
    ("gained", "lost"), [(0.0, 0.05), (0.05, 0.1), (0.3, 0.02), (0.25, 0.25), (0.0, 0.6)]
)
def test_a_paired_difference_of_verdicts_is_covered_exactly(n, gained, lost):
    coverage = 0.0
    for up, down in itertools.product(range(n + 1), repeat=2):
        chance = (
            multinomial.pmf([up, down, n - up - down], n, [gained, lost, 1 - gained - lost])
            if up + down <= n
            else 0
        )
        if chance > 1e-9:
            _, low, high = stats.paired_proportions((up - down) / n, (up + down) / n, n)
            coverage += chance * (low <= gained - lost <= high)
    assert coverage >= COVERS


@pytest.mark.parametrize("n", [24, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_verdicts_with_repeats_are_covered(n, signed):
    rng = np.random.default_rng(n)

    def verdicts() -> np.ndarray:
        # mean .3, alike in a cluster
        return (rng.random((3000, n, 4)) < rng.beta(0.6, 1.4, size=(3000, n, 1))).astype(float)

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
    assert stats.clustered_mean(never)[1:] == pytest.approx(
        proportion_confint(0, 64, method="beta")
    )
    low, high = stats.paired_difference(never + 1, never + 1)[1:]
    assert low == -high == pytest.approx(-1.959964 / 66, rel=1e-5)
    # numbers, not verdicts: nothing varies
    assert stats.paired_difference(never + 0.9, never + 0.9) == (0, 0, 0)
    assert str(stats.finite(18)) == "18.000"
    assert np.isnan(stats.clustered_mean(np.array([[0.3, 0.4]]))[1:]).all()


def test_continuous_repeats_are_students_interval_of_cluster_means():
    values = np.random.default_rng(0).normal(size=(12, 5))
    means = values.mean(axis=1)
    half = student.ppf(0.975, 11) * means.std(ddof=1) / np.sqrt(12)
    assert stats.clustered_mean(values) == pytest.approx(
        (means.mean(), means.mean() - half, means.mean() + half)
    )


@pytest.mark.parametrize("n", [4, 5, 9, 30])
def test_a_rank_correlation_is_bonett_and_wrights(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = np.roll(x, 1) + rng.normal(size=n)
    (rho, low, high), p = stats.rank_correlation(x, y)
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert (rho, p) == pytest.approx(tuple(spearmanr(x, y)))
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    assert np.arctanh([low, high]) == pytest.approx(
        [np.arctanh(rho) - half, np.arctanh(rho) + half], abs=1e-4
    )
    for constant in ((x, np.ones(n)), (np.ones(n), y), (x[:3], y[:3])):
        assert np.isnan(
            [*stats.rank_correlation(*constant)[0], stats.rank_correlation(*constant)[1]]
        ).all()
    perfect, _ = stats.rank_correlation(x, -np.exp(x))
    assert perfect.mean == pytest.approx(-1)
    assert perfect.low == pytest.approx(-1)
    assert -1 < perfect.high < 0 or n < 9


@pytest.mark.parametrize(("drawn", "total"), [(1, 6), (3, 6), (5, 6), (10, 30)])
def test_a_bound_on_a_count_is_the_largest_that_the_sample_does_not_exclude(drawn, total):
    """Against sums over all samples of the population."""
    for hits, level in itertools.product(range(drawn + 1), (0.61, 0.95)):
        likely = []
        for count in range(hits, total - drawn + hits + 1):
            ways = [
                math.comb(count, seen) * math.comb(total - count, drawn - seen)
                for seen in range(hits + 1)
            ]
            if sum(ways) / math.comb(total, drawn) > 1 - level:
                likely.append(count)
        assert stats.count_bound(hits, drawn, total, level) == max(likely)
    assert stats.count_bound(2, total, total) == 2
    assert stats.count_bound(0, 10, 30) == stats.count_bound(0, 10, 30, 0.95)


def test_a_paired_difference_stays_within_its_range():
    assert stats.paired_proportions(1.0, 1.0, 5).high == 1
    assert stats.paired_proportions(-1.0, 1.0, 5).low == -1
    assert stats.paired_proportions(0.9, 0.9, 40).high < 1


def test_one_cluster_has_a_mean_and_no_interval_and_none_has_neither():
    assert stats.clustered_mean(np.array([[1.0, 0.0, 1.0, 1.0]])).mean == 0.75
    assert np.isnan(stats.clustered_mean(np.array([[1.0, 0.0, 1.0, 1.0]]))[1:]).all()
    assert np.isnan(stats.clustered_mean(np.full((3, 2), np.nan))).all()
    assert np.isnan(stats.proportion(np.full(3, np.nan))).all()


def test_verdicts_with_repeats_have_the_size_of_an_independent_sample_of_their_variance():
    values = (np.random.default_rng(1).random((30, 6)) < np.linspace(0.1, 0.9, 30)[:, None]).astype(
        float
    )
    mean, spread = values.mean(), values.mean(axis=1).var(ddof=1) / 30
    size = min(values.var() / spread * (1.959964 / student.ppf(0.975, 29)) ** 2, values.size)
    assert 30 < size < 180
    expected = proportion_confint(mean * size, size, method="wilson")
    assert stats.clustered_mean(values) == pytest.approx((mean, *expected), rel=1e-5)
    alike = np.repeat([[1.0], [0.0]], [3, 5], axis=0).repeat(4, axis=1)  # repeats that add nothing
    few = values_of_clusters(alike)
    assert stats.clustered_mean(alike) == pytest.approx(few, rel=1e-5)


def values_of_clusters(values: np.ndarray) -> tuple[float, ...]:
    n, mean = len(values), values.mean()
    size = (
        mean
        * (1 - mean)
        / (values[:, 0].var(ddof=1) / n)
        * (1.959964 / student.ppf(0.975, n - 1)) ** 2
    )
    return (mean, *proportion_confint(mean * size, size, method="wilson"))


@pytest.mark.parametrize("n", [1, 2, 40])
def test_holm_is_that_of_statsmodels(n: int) -> None:
    rng = np.random.default_rng(n)
    for p in (rng.uniform(size=n), np.repeat(0.01, n), rng.uniform(size=n) ** 4):
        np.testing.assert_allclose(stats.holm(p), multipletests(p, method="holm")[1])


def test_clustered_mean_agrees_with_the_binomial_interval_for_independent_images():
    values = (np.random.default_rng(0).random((400, 1)) < 0.3).astype(float)
    ours = stats.clustered_mean(values)
    exact = binomtest(int(values.sum()), 400).proportion_ci(method="wilson")
    assert ours.mean == values.mean()
    assert ours.low == pytest.approx(exact.low, abs=0.015)
    assert ours.high == pytest.approx(exact.high, abs=0.015)


def test_clusters_widen_the_interval_and_nan_is_left_out():
    rng = np.random.default_rng(1)
    cluster = (rng.random((60, 1)) < 0.5).astype(float)
    repeated = np.repeat(cluster, 20, axis=1)  # 1,200 numbers, 60 facts
    ours = stats.clustered_mean(repeated)
    half = norm.ppf(0.975) * np.sqrt(repeated.mean() * (1 - repeated.mean()) / 60)
    assert (ours.high - ours.low) / 2 == pytest.approx(half, rel=0.2)
    with_gaps = repeated.copy()
    with_gaps[:, 10:] = np.nan
    assert stats.clustered_mean(with_gaps).mean == ours.mean
    assert np.isnan(stats.clustered_mean(np.full((3, 2), np.nan)).mean)
    assert np.isnan(stats.clustered_mean(np.empty((0, 1)))).all()
    sparse = np.full((96, 1), np.nan)
    sparse[:3, 0] = -5, -7, -6
    assert pytest.approx(stats.clustered_mean(sparse)[1:]) == stats.clustered_mean(sparse[:3])[1:]


def test_a_paired_difference_is_sharper_than_two_means():
    rng = np.random.default_rng(2)
    before = (rng.random((200, 1)) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 0
    paired = stats.paired_difference(before, after)
    assert paired.mean == (after - before).mean()
    assert paired.high < 0
    apart = stats.clustered_mean(before)
    assert paired.high - paired.low < (apart.high - apart.low) / 2
