"""Intervals for the numbers this package reports."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, bootstrap, hypergeom, norm, spearmanr


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def clustered_mean(values: Float[np.ndarray, "cluster repeat"], rng: int = 0, resamples: int = 2000) -> Interval:
    """Mean over everything that is not NaN; the interval resamples whole clusters (scipy's percentile bootstrap).

    Seeds of one prompt are not independent draws, so an accuracy over prompts × seeds has its prompts as clusters.
    """
    return Interval(*(float(bound) for bound in clustered_means(values[None], rng, resamples)[0]))


def clustered_means(
    values: Float[np.ndarray, "condition cluster repeat"], rng: int = 0, resamples: int = 2000
) -> Float[np.ndarray, "condition bound"]:
    """`clustered_mean` of every condition (mean, low, high), all from the same resamples of clusters."""
    valid = ~np.isnan(values)
    sums, counts = np.where(valid, values, 0.0).sum(axis=2), valid.sum(axis=2)
    total = counts.sum(axis=1)
    mean = np.divide(sums.sum(axis=1), total, out=np.full(len(values), np.nan), where=total > 0)
    found = np.stack([mean] * 3, axis=1)
    if values.shape[1] < 2:  # which scipy's bootstrap refuses
        return found
    varies = (total > 0) & ((np.ptp(sums, axis=1) > 0) | (np.ptp(counts, axis=1) > 0))
    if not varies.any():
        return found
    found_again = bootstrap(
        (sums[varies], counts[varies]),
        lambda s, c, axis=-1: s.sum(axis) / np.where(c.sum(axis), c.sum(axis), np.nan),  # a resample may have drawn NaN alone
        axis=-1,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, 2**24 // sums[varies].size),  # a resample of all conditions at a time is what memory has to hold
        rng=rng,
    ).bootstrap_distribution
    found[varies, 1], found[varies, 2] = np.nanpercentile(found_again, [2.5, 97.5], axis=-1)
    return found


def proportion(hits: Float[np.ndarray, " n"]) -> Interval:
    """Share of ones among independent zeros and ones that are not NaN, with its Wilson interval; NaN of nothing."""
    valid = hits[~np.isnan(hits)]
    if not len(valid):
        return Interval(np.nan, np.nan, np.nan)
    interval = binomtest(int(valid.sum()), len(valid)).proportion_ci(method="wilson")
    return Interval(float(valid.mean()), float(interval.low), float(interval.high))


def paired_difference(
    before: Float[np.ndarray, "cluster repeat"], after: Float[np.ndarray, "cluster repeat"], rng: int = 0
) -> Interval:
    """Mean of after − before over pairs (same prompt, same noise), with `clustered_mean`'s interval."""
    return clustered_mean(after - before, rng)


def rank_correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[Interval, float]:
    """Spearman's ρ with its interval, and the p-value that there is none (scipy's). NaN for constants and for less than 4 pairs.

    Source of the interval: Bonett & Wright 2000, Psychometrika 65, p. 23: normal in arctanh ρ, variance (1 + ρ²/2) / (n − 3).
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(np.nan, np.nan, np.nan), np.nan
    rho, p = (float(value) for value in spearmanr(x, y))
    width = norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    centre = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))  # finite also for a perfect order
    return Interval(rho, float(np.tanh(centre - width)), float(np.tanh(centre + width))), p


def count_bound(hits: int, drawn: int, total: int, level: float = 0.95) -> int:
    """At most so many of `total` things have a property that `hits` of `drawn` ones, drawn without replacement, had.

    The largest count under which so few hits have a probability above 1 − level (hypergeometric; one-sided and exact).
    """
    if drawn == total:
        return hits
    counts = np.arange(hits, total - drawn + hits + 1)
    return int(counts[hypergeom.cdf(hits, total, counts, drawn) > 1 - level][-1])
