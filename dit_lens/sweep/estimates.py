"""Effects of cells over the population that scenes are drawn from.

From exact runs on some scenes and cheap scores on more. The score is a control variate: λ · (mean
score over all scored scenes) + (mean of exact − λ · score over the scenes that were run). λ is the
slope of exact effects on scores within a cell, drawn toward that of all cells. Sources:
Angelopoulos et al. 2023, Science 382, p. 669 (prediction-powered inference); Smyth 2004, Stat.
Appl. Genet. Mol. Biol. 3, article 3 (variances drawn toward a prior).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import norm
from scipy.stats import t as student

PRIOR_SCENES = 4.0
"""Scenes that the common slope and the common variance count for, beside a cell's own."""


LEAST_SCENES = 8
"""Scenes without which a cell has no interval."""
LEAST_SPREAD = 1e-3
"""Least variance of effects, in units of a scene's."""


@dataclass(frozen=True)
class Estimates:
    """Means over the population, with their standard errors; NaN for cells that were not run.

    Example:
        >>> exact = np.array([[1.0, 3.0, np.nan, np.nan]])
        >>> scores = np.array([[1.0, 3.0, 5.0, 7.0]])
        >>> controlled(exact, scores).mean.tolist()  # the mean score is 2 above that of those run
        [4.0]
    """

    mean: Float[np.ndarray, " cell"]
    error: Float[np.ndarray, " cell"]
    dof: Float[np.ndarray, " cell"]
    """Degrees of freedom of the errors."""
    scenes: Int[np.ndarray, " cell"]
    """Scenes on which a cell was run."""

    def intervals(self, level: float = 0.95, of: int = 1) -> Float[np.ndarray, "cell 2"]:
        """Student's intervals; jointly at the level if there are `of` of them (Bonferroni).

        Cells that were run on fewer than `LEAST_SCENES` have infinite ones: effects have heavy
        tails, and few scenes miss the rare large one.
        """
        half = student.isf((1 - level) / 2 / of, self.dof) * self.error
        half = np.where(self.scenes >= LEAST_SCENES, half, np.inf)
        centre = np.where(self.scenes > 0, self.mean, 0.0)
        return np.stack([centre - half, centre + half], axis=1)

    def expected_sizes(self) -> Float[np.ndarray, " cell"]:
        """Expected magnitudes given the estimates, by which cells are chosen; 0 if not run.

        Effects in units of a scene's standard deviation are taken as normal around 0, with a
        variance from all cells (empirical Bayes). If two estimates are equal, the noisier one is
        expected to be larger: it is run on new scenes, which decide.
        """
        run = (self.scenes > 0) & (np.nan_to_num(self.error) > 0)
        found = np.where(self.scenes > 0, np.abs(np.nan_to_num(self.mean)), 0.0)
        if not run.any():
            return found
        mean, variance = self.mean[run], np.square(self.error[run])
        of_scene = variance * self.scenes[run]
        weight = 1 / np.square(1 + variance / of_scene)
        excess = float((weight * (np.square(mean) - variance) / of_scene).sum() / weight.sum())
        prior = max(excess, LEAST_SPREAD) * of_scene
        shrink = prior / (prior + variance)
        centre, spread = shrink * mean, np.sqrt(shrink * variance)
        found[run] = spread * np.sqrt(2 / np.pi) * np.exp(-np.square(centre / spread) / 2)
        found[run] += centre * (1 - 2 * norm.cdf(-centre / spread))
        return found


def controlled(
    exact: Float[np.ndarray, "cell scene"], scores: Float[np.ndarray, "cell scene"]
) -> Estimates:
    """Estimate each cell's mean effect over the population of scenes.

    Args:
        exact: effects, NaN where a cell was not run.
        scores: NaN where there is none; a cell without any has the plain mean of its exact effects.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> scores = rng.normal(size=(1, 400))
        >>> exact = np.where(np.arange(400) < 20, scores + 0.1 * rng.normal(size=(1, 400)), np.nan)
        >>> plain = controlled(exact, np.full_like(scores, np.nan))
        >>> bool(controlled(exact, scores).error < plain.error / 2)
        True
    """
    run, scored = ~np.isnan(exact), ~np.isnan(scores)
    used = np.where(scored.any(axis=1, keepdims=True), run & scored, run)
    n, n_scored = used.sum(axis=1), scored.sum(axis=1)
    effects, predicted = np.where(used, exact, 0.0), np.where(scored, scores, 0.0)
    slopes = _slopes(_centred(effects, used), _centred(predicted, used & scored), n)
    residual = effects - slopes[:, None] * np.where(used, predicted, 0.0)
    mean_score = predicted.sum(axis=1) / np.maximum(n_scored, 1)
    mean = residual.sum(axis=1) / np.maximum(n, 1) + slopes * mean_score
    scale = np.where(n_scored > 0, np.square(predicted).sum(axis=1) / np.maximum(n_scored, 1), 0.0)
    free = np.maximum(n - 1, 0).astype(float)
    own_slope = np.where(slopes != 0, free / (free + PRIOR_SCENES), 0.0)  # its share of one
    of_residual = _variances(
        np.square(_centred(residual, used)).sum(axis=1), np.maximum(free - own_slope, 0.0), scale
    )
    of_effect = _variances(np.square(_centred(effects, used)).sum(axis=1), free, scale)
    by_score = np.where(n_scored > 0, np.maximum(of_effect - of_residual, 0.0), 0.0)
    variance = of_residual / np.maximum(n, 1) + by_score / np.maximum(n_scored, 1)
    dof = PRIOR_SCENES + np.maximum(n - 1, 0)
    return Estimates(
        np.where(n > 0, mean, np.nan), np.where(n > 0, np.sqrt(variance), np.nan), dof, n
    )


def _centred(
    values: Float[np.ndarray, "cell scene"], used: Bool[np.ndarray, "cell scene"]
) -> Float[np.ndarray, "cell scene"]:
    mean = np.where(used, values, 0.0).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
    return np.where(used, values - mean[:, None], 0.0)


def _slopes(
    effects: Float[np.ndarray, "cell scene"],
    scores: Float[np.ndarray, "cell scene"],
    n: Int[np.ndarray, " cell"],
) -> Float[np.ndarray, " cell"]:
    """Slopes of centred effects on centred scores; 0 where there is nothing to see one from."""
    product, square = (effects * scores).sum(axis=1), np.square(scores).sum(axis=1)
    known = (n > 1) & (square > 0)
    if not known.any():
        return np.zeros(len(n))
    common = float(np.median(product[known] / square[known]))
    prior = PRIOR_SCENES * square / np.maximum(n - 1, 1)
    return np.where(known, (product + prior * common) / np.where(known, square + prior, 1.0), 0.0)


def _variances(
    squares: Float[np.ndarray, " cell"],
    dof: Float[np.ndarray, " cell"],
    scale: Float[np.ndarray, " cell"],
) -> Float[np.ndarray, " cell"]:
    """Variances from sums of squares, drawn up toward a multiple of the mean squared score.

    Never down, and the multiple is common to all: few scenes often miss the rare large effect.
    """
    known = dof > 0
    if not known.any():
        return np.zeros(len(dof))
    own = squares[known] / dof[known]
    usual = np.where(scale > 0, scale, np.median(own))
    seen = usual[known] > 0
    times = float(np.median(own[seen] / usual[known][seen])) if seen.any() else 1.0
    drawn = (PRIOR_SCENES * times * usual + squares) / (PRIOR_SCENES + dof)
    return np.maximum(drawn, squares / np.where(known, dof, 1.0))
