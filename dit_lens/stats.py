"""Intervals for the numbers this package reports."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import hypergeom, norm, spearmanr
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint


class Interval(NamedTuple):
    """An estimate and its 95 % interval.

    Example:
        >>> print(Interval(0.5, 0.4, 0.6))
        0.500 [0.400, 0.600]
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Mean and bounds with three decimals; the mean alone if the bounds are equal."""
        return (
            f"{self.mean:.3f}"
            if self.low == self.high
            else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
        )


def clustered_mean(values: Float[np.ndarray, "cluster repeat"], signed: bool = False) -> Interval:
    """Mean over all values that are not NaN, with an interval for independent clusters.

    Seeds of one prompt are not independent draws, so an accuracy over prompts × seeds has its
    prompts as clusters.

    Args:
        values: NaN marks a missing value.
        signed: True for differences of two verdicts (−1, 0 or 1), whose zeros and ones are no
            proportion.

    Returns:
        For zeros and ones a `proportion`, for differences of verdicts an Agresti–Min interval, else
        Student's t. The bounds are NaN for fewer than two clusters.

    Example:
        >>> print(clustered_mean(np.array([[1.0], [2.0], [4.0]])))
        2.333 [-1.461, 6.128]
        >>> print(clustered_mean(np.zeros((104, 1))))
        0.000 [0.000, 0.035]
    """
    return Interval(*(float(bound) for bound in clustered_means(values[None], signed)[0]))


def clustered_means(
    values: Float[np.ndarray, "condition cluster repeat"], signed: bool = False
) -> Float[np.ndarray, "condition bound"]:
    """Apply `clustered_mean` to each condition; returns its mean, low and high bound.

    Clusters of unequal size: the variance is that of the ratio estimator (Cochran 1977, Sampling
    Techniques, § 6.3). Verdicts with repeats: n is the size of an independent sample of equal
    variance (Korn & Graubard 1998, Survey Methodology 24, p. 193).

    Example:
        >>> values = np.array([[[0.1, 0.3], [0.2, np.nan], [0.4, 0.2]]])
        >>> clustered_means(values).round(3).tolist()
        [[0.24, 0.082, 0.398]]
    """
    return np.array([_interval(table, signed) for table in values.astype(float)]).reshape(
        len(values), 3
    )


def _interval(
    values: Float[np.ndarray, "cluster repeat"], signed: bool, verdicts: bool = True
) -> Interval:
    valid = ~np.isnan(values)
    counts = valid.sum(axis=1)
    sums, counts = np.where(valid, values, 0.0).sum(axis=1)[counts > 0], counts[counts > 0]
    clusters, total = len(counts), counts.sum()
    if clusters == 0:
        return Interval(np.nan, np.nan, np.nan)
    mean = sums.sum() / total
    if clusters == 1:
        return Interval(mean, np.nan, np.nan)
    variance = clusters / (clusters - 1) * ((sums - mean * counts) ** 2).sum() / total**2
    t = student.ppf(0.975, clusters - 1)
    found = values[valid]
    if not (verdicts and np.isin(found, (-1, 0, 1) if signed else (0, 1)).all()):
        half = t * np.sqrt(variance)
        return Interval(mean, mean - half, mean + half)
    n = float(clusters)
    if total > clusters:  # several verdicts a cluster
        n = float(
            min(found.var() / variance * (norm.ppf(0.975) / t) ** 2, total)
            if variance > 0
            else clusters
        )
    return paired_proportions(mean, (found**2).mean(), n) if signed else _wilson(mean, n)


def _wilson(share: float, n: float | int) -> Interval:
    method = "beta" if share in (0, 1) else "wilson"
    low, high = proportion_confint(share * n, n, method=method)
    return Interval(share, float(low), float(high))


def paired_proportions(difference: float, discordant: float, n: float | int) -> Interval:
    """Difference of two proportions over the same n units.

    Source: Agresti & Min 2005, Statistics in Medicine 24, p. 729: Wald's interval after half a unit
    is added to each cell.

    Args:
        difference: mean of after − before.
        discordant: share of units whose two verdicts differ.
        n: number of units, or the effective size of a clustered sample.

    Example:
        >>> print(paired_proportions(0.0, 0.0, 64))
        0.000 [-0.030, 0.030]
    """
    size = n + 2
    shrunk, apart = difference * n / size, (discordant * n + 1) / size
    half = norm.ppf(0.975) * np.sqrt((apart - shrunk**2) / size)
    return Interval(difference, float(max(shrunk - half, -1)), float(min(shrunk + half, 1)))


def proportion(hits: Float[np.ndarray, " n"]) -> Interval:
    """Share of ones among independent zeros and ones that are not NaN; NaN if there are none.

    Wilson's interval; exact (Clopper & Pearson) if all values are equal.

    Example:
        >>> print(proportion(np.array([1.0, 1.0, 0.0, 1.0, np.nan])))
        0.750 [0.301, 0.954]
    """
    valid = hits[~np.isnan(hits)]
    return (
        _wilson(float(valid.mean()), len(valid)) if len(valid) else Interval(np.nan, np.nan, np.nan)
    )


def paired_difference(
    before: Float[np.ndarray, "cluster repeat"], after: Float[np.ndarray, "cluster repeat"]
) -> Interval:
    """Mean of after − before over pairs (same prompt, same noise); interval of `clustered_mean`.

    If before and after are zeros and ones, the differences are those of verdicts; else the interval
    is Student's t, even if nothing changes.

    Example:
        >>> before, after = np.array([[1.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [1.0]])
        >>> print(paired_difference(before, after))
        -0.667 [-0.981, 0.181]
    """
    both = np.concatenate([before.ravel(), after.ravel()]).astype(float)
    if np.isin(both[~np.isnan(both)], (0, 1)).all():
        return clustered_mean(after - before, signed=True)
    return _interval((after - before).astype(float), signed=True, verdicts=False)


def finite(value: float | int) -> Interval:
    """Value over a finite population that was counted in full: both bounds equal it.

    Example:
        >>> print(finite(0.25))
        0.250
    """
    return Interval(value, value, value)


def rank_correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Interval, float]:
    """Spearman's ρ with its 95 % interval, and scipy's p-value of ρ = 0.

    NaN for constants and for fewer than 4 pairs.

    Source of the interval: Bonett & Wright 2000, Psychometrika 65, p. 23: normal in arctanh ρ, with
    variance (1 + ρ²/2) / (n − 3).

    Example:
        >>> rho, p = rank_correlation(np.arange(8.0), np.array([0.0, 2, 1, 3, 4, 6, 5, 7]))
        >>> print(rho, round(p, 4))
        0.952 [0.664, 0.994] 0.0003
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(np.nan, np.nan, np.nan), np.nan
    rho, p = (float(value) for value in spearmanr(x, y))
    width = norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    centre = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))  # finite also for a perfect order
    return Interval(rho, float(np.tanh(centre - width)), float(np.tanh(centre + width))), p


def count_bound(hits: int, drawn: int, total: int, level: float = 0.95) -> int:
    """Upper confidence bound on the number of units with a property, out of `total`.

    Hypergeometric, one-sided and exact: the largest count under which at most `hits` among `drawn`
    units have a probability above 1 − level.

    Args:
        hits: units with the property in the sample.
        drawn: size of the sample, drawn without replacement.
        total: size of the population.
        level: confidence.

    Example:
        >>> count_bound(0, 50, 1000)
        56
    """
    if drawn == total:
        return hits
    counts = np.arange(hits, total - drawn + hits + 1)
    return int(counts[hypergeom.cdf(hits, total, counts, drawn) > 1 - level][-1])


def holm(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """p-values that hold for the whole family of n questions, by Holm's step-down method.

    As statsmodels' `multipletests(p, method="holm")[1]`, which runs the garbage collector over the
    whole process at each call.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.02])).tolist()
        [0.03, 0.04, 0.04]
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    family = np.empty(len(p))
    family[order] = np.minimum(stepped, 1)
    return family
