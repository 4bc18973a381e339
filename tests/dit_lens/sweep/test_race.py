"""Races on populations whose means are known: the guarantee, the control variate, the halving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float

from dit_lens.sweep.estimates import Estimates, controlled
from dit_lens.sweep.race import Prices, Race, Rules, run_race, sizes

CELLS, SCENES, K = 60, 200, 5


@dataclass
class Known:
    """Effects around known means, and scores that foresee a part of them."""

    means: Float[np.ndarray, " cell"]
    seed: int
    heavy: bool = False
    agreement: float = 0.8
    """Correlation of score and effect within a cell."""

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        shape = (len(self.means), SCENES)
        common, own, other = (
            draw.standard_t(3, shape) / np.sqrt(3) if self.heavy else draw.normal(size=shape)
            for _ in range(3)
        )
        rest = np.sqrt(1 - self.agreement**2)
        self.effects = self.means[:, None] + self.agreement * common + rest * own
        self.predicted = 0.7 * self.means[:, None] + common + 0.3 * other
        self.asked: list[tuple[np.ndarray, range]] = []

    def exact(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        self.asked.append((cells, scenes))
        return self.effects[cells][:, scenes.start : scenes.stop]

    def scores(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        return self.predicted[cells][:, scenes.start : scenes.stop]


def means(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.where(np.arange(CELLS) < 12, draw.normal(0, 1.5, CELLS), draw.normal(0, 0.2, CELLS))


PRICES = Prices(np.ones(CELLS), np.full(CELLS, 0.05), slope=1.0, clean=0.5)


def race(seed: int, heavy: bool = False, **rules: Any) -> tuple[Known, Race]:
    oracle = Known(means(seed), seed + 1000, heavy)
    given_rules = replace(Rules(K, SCENES, budget=8.0, sample=15, rng=seed), **rules)
    return oracle, run_race(oracle, PRICES, given_rules)


@pytest.mark.parametrize(("budget", "heavy"), [(2.0, True), (8.0, False)])
def test_the_guarantee_is_broken_in_no_more_than_its_share(budget, heavy):
    """Both halves of it, in 200 searches: the gap within the last round, and the number missed."""
    gaps = missed = 0
    for seed in range(200):
        oracle, found = race(seed, heavy, budget=budget)
        size, top = abs(oracle.means), found.top
        others = np.setdiff1d(found.alive, top)
        gaps += size[others].max() - size[top].min() > found.gap
        beyond = abs(found.estimates.mean[top]).min()
        larger = (np.delete(size, top) > beyond).sum()
        missed += larger > found.missed(beyond)[2]
    assert gaps <= 10
    assert missed <= 10


def test_joint_intervals_hold_together():
    broken = 0
    for seed in range(200):
        oracle, found = race(seed)
        low, high = found.joint.T
        ran = found.lasted > 0
        broken += ((oracle.means < low) | (oracle.means > high))[ran].any()
    assert broken <= 10


def test_the_money_buys_more_of_the_top_than_the_sweep_of_all():
    """At equal cost: the share of the top's effect that the five found have."""
    shares = []
    for seed in range(60):
        oracle, found = race(seed)
        assert found.spent <= 8.0 * PRICES.exhaustive * 1.05
        size = abs(oracle.means)
        swept = np.argsort(-abs(oracle.effects[:, -8:].mean(axis=1)))[:K]
        best = np.sort(size)[-K:].sum()
        shares.append([size[found.top].sum() / best, size[swept].sum() / best])
    ours, sweeps = np.mean(shares, axis=0)
    assert ours > sweeps
    assert ours > 0.93


def test_a_control_variate_is_unbiased_and_has_less_error_than_the_plain_mean():
    """Against known means, over populations; its standard error is that which is seen."""
    errors, plain, claimed = [], [], []
    for seed in range(400):
        oracle = Known(means(0), seed)
        exact = np.where(np.arange(SCENES) < 10, oracle.effects, np.nan)
        found = controlled(exact, oracle.predicted)
        errors.append(found.mean - oracle.means)
        plain.append(oracle.effects[:, :10].mean(axis=1) - oracle.means)
        claimed.append(found.error)
    spread, ours = np.std(plain), np.std(errors)
    assert abs(np.mean(errors)) < 4 * ours / np.sqrt(400 * CELLS)
    assert np.abs(np.mean(errors, axis=0)).max() < 4.5 * ours / np.sqrt(400)
    assert ours < 0.8 * spread
    assert 0.95 < np.sqrt(np.square(claimed).mean()) / ours < 1.25


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.floats(0.5, 20),
    k=st.integers(1, 8),
    sample=st.integers(1, 20),
    tolerance=st.sampled_from([0.0, 1.0]),
)
def test_nothing_leaves_while_its_interval_reaches_into_the_top_unless_marked(
    seed, budget, k, sample, tolerance
):
    """Rounds shrink, scenes are new in each, and the budget is kept but for the last scene."""
    oracle, found = race(seed, budget=budget, k=k, sample=sample, tolerance=tolerance)
    rounds = [set(cells.tolist()) for cells, _ in oracle.asked]
    for before, after in pairwise(rounds):
        assert after <= before
    ends = [(scenes.start, scenes.stop) for _, scenes in oracle.asked]
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    for turn, (before, after) in enumerate(pairwise(rounds)):
        # as the numbers stood when the round ended
        stop = ends[turn][1]
        exact = np.full((CELLS, SCENES), np.nan)
        for cells, scenes in oracle.asked[: turn + 1]:
            exact[np.ix_(cells, np.arange(scenes.start, scenes.stop))] = oracle.effects[
                np.ix_(cells, np.arange(scenes.start, scenes.stop))
            ]
        scores = np.where(np.isnan(found.scores), np.nan, oracle.predicted)
        later = np.isnan(found.exact[list(after)][:, :stop]).all()
        assert not later
        then = replace(found, exact=exact, scores=_scored_by(found, scores, stop))
        low, high = sizes(then.joint)
        alive = np.array(sorted(before))
        bar = np.sort(low[alive])[-k]
        left = np.array(sorted(before - after), dtype=int)
        assert found.close[left[high[left] >= bar]].all()
    assert len(found.top) == k


def _scored_by(found: Race, scores: np.ndarray, stop: int) -> np.ndarray:
    """Scores that were known when the scenes before `stop` had been run."""
    everywhere = ~np.isnan(found.scores).any(axis=0)
    return np.where(everywhere | (np.arange(SCENES) < stop), scores, np.nan)


def test_a_tolerance_ends_a_race_early():
    _, whole = race(3, budget=40.0)
    _, early = race(3, budget=40.0, tolerance=whole.gap + 1.0)
    assert early.gap <= whole.gap + 1.0
    assert early.spent < whole.spent


def test_cells_without_scores_all_enter():
    oracle = Known(means(1), 1)
    rules = Rules(K, SCENES, budget=8.0, sample=5)
    found = run_race(oracle, PRICES, rules, unscored=range(CELLS))
    assert (found.lasted > 0).all()
    assert np.isnan(found.scores).all()
    ran = found.estimates.scenes
    plain = np.array([oracle.effects[cell, :n].mean() for cell, n in enumerate(ran)])
    np.testing.assert_allclose(found.estimates.mean, plain)


def test_a_noisier_estimate_is_expected_to_be_larger():
    found = Estimates(
        np.array([1.0, 1.0, -3.0, np.nan]),
        np.array([0.1, 0.9, 0.1, np.nan]),
        np.full(4, 8.0),
        np.array([5, 5, 5, 0]),
    ).expected_sizes()
    assert found[3] == 0
    assert found[2] > found[1] > 0
