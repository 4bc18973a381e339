"""Split-half stability: would other prompts have given the same largest effects?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

SPLITS = 50
"""Random halves that are averaged over."""


class Stability(NamedTuple):
    """Agreement of a sweep's largest effects between random halves of its prompts.

    Example:
        >>> print(Stability(3, 0.25, 0.4, 0.1))
        top 3 of half the prompts: 25 % in the other half's, 40 % of its effect (chance 10 %)
    """

    k: int
    agreement: float
    """Share of one half's k largest effects that are among the other half's k largest …"""
    effect: float
    """… and their effect in the other half, in the direction found, over that of its own k largest:
    at most 1; around 0 if a half ranks noise.
    """
    chance: float
    """Agreement of k random conditions."""

    def __str__(self) -> str:
        """For people."""
        return (
            f"top {self.k} of half the prompts: {self.agreement:.0%} in the other half's, "
            f"{self.effect:.0%} of its effect (chance {self.chance:.0%})"
        ).replace("%", " %")


def stability(found: xr.Dataset, metric: str, k: int = 10, rng: int = 0) -> Stability:
    """Split-half stability of a sweep's k largest effects on a metric.

    Prompts are split at random, `SPLITS` times; of one prompt, seeds are. A low agreement says that
    the order of the largest effects is noise: run more prompts, or `sweep.search`, which spends
    them on the cells that matter. A sweep of all prompts is more stable than its halves.

    Args:
        found: result of `sweep.run`.
        metric: column of it.
        k: how many of the largest; at most half of the conditions.
        rng: seed of the splits.

    Raises:
        ValueError: no such metric, or one prompt and one seed, which have no halves.

    Example:
        >>> values = np.random.default_rng(0).normal(size=(20, 8, 1))
        >>> dims = ("intervention", "prompt", "seed")
        >>> noise = xr.Dataset({"m": (dims, values), "m_baseline": (dims, 0 * values)})
        >>> stability(noise, "m", k=5).agreement < 0.5
        True
    """
    if metric not in found or f"{metric}_baseline" not in found:
        raise ValueError(
            f"The sweep has no metric {metric!r}: it has "
            f"{', '.join(name[:-9] for name in map(str, found) if name.endswith('_baseline'))}."
        )
    after, before = found[metric], found[f"{metric}_baseline"]
    difference = (after - before).transpose("intervention", "prompt", "seed").values
    if difference.shape[1] == 1:
        difference = difference.swapaxes(1, 2)
    if difference.shape[1] < 2:
        raise ValueError("One prompt with one seed has no halves: run several prompts or seeds.")
    return split_half(difference, k, rng)


def split_half(
    difference: Float[np.ndarray, "intervention prompt seed"], k: int, rng: int = 0
) -> Stability:
    """`stability` of differences from the runs without intervention; NaN are left out.

    Example:
        >>> split_half(np.arange(12.0)[:, None, None] * np.ones((12, 4, 1)), k=3).agreement
        1.0
    """
    means = _means(difference, 2)
    n, prompts = means.shape
    k = max(1, min(k, n // 2))
    draw = np.random.default_rng(rng)
    agreements, effects = [], []
    for _ in range(SPLITS):
        order = draw.permutation(prompts)
        one = _means(means[:, order[: prompts // 2]], 1)
        other = _means(means[:, order[prompts // 2 :]], 1)
        top, its = (np.argsort(-np.abs(np.nan_to_num(half)))[:k] for half in (one, other))
        agreements.append(np.isin(top, its).mean())
        whole = np.nansum(np.abs(other[its]))
        effects.append(np.nansum(np.sign(one[top]) * other[top]) / whole if whole > 0 else np.nan)
    return Stability(k, float(np.mean(agreements)), float(np.mean(effects)), k / n)


def _means(values: np.ndarray, axis: int) -> np.ndarray:
    """Means of those that are not NaN; NaN where all are."""
    valid = ~np.isnan(values)
    counts = valid.sum(axis=axis)
    sums = np.where(valid, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
