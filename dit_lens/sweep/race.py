"""A race of cells: which have the largest mean effects over a population of scenes.

All cells are scored on some scenes. The largest scores, and a random sample of the others, are run
exactly; of these the larger half goes on, on new scenes, and so on, until the budget is spent or
the joint intervals set the top apart. Nothing here knows of models: `Oracle` gives the numbers.
Source of the halving: Karnin, Koren & Somekh 2013, ICML, p. 1238.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from ..stats import count_bound
from .estimates import LEAST_SCENES, Estimates, controlled

ROUNDS = 3
ENTRANTS = 8
"""Cells that are run in the first round, for each place in the top, at most."""
LEAST_FINAL = 10
"""Scenes of the finalists without which nothing is said about their order: on eight, with heavy
tails, one search in ten broke its bound.
"""
FEWEST = 4
"""Scenes of the first round, if a small budget does not pay for `LEAST_SCENES`."""
FINALISTS = 2
"""Cells that are run in the last round, for each place in the top."""
SCORING = 0.1
"""Largest share of the budget that goes into scores of all cells, beyond `LEAST_SCORED` scenes."""
LEAST_SCORED = 2
SAMPLING = 0.15
"""Largest share of the first round that goes into the random sample."""
Cells = Int[np.ndarray, " _cell"]


@runtime_checkable
class Oracle(Protocol):
    """Numbers of a search: scenes are places in a random order."""

    def scores(self, cells: Cells, scenes: range) -> Float[np.ndarray, "cell scene"]:
        """Estimated effects; NaN for cells that have no score."""
        ...

    def exact(self, cells: Cells, scenes: range) -> Float[np.ndarray, "cell scene"]:
        """Effects; NaN where the metric failed."""
        ...


@dataclass(frozen=True)
class Prices:
    """Cost of a scene, in any unit."""

    exact: Float[np.ndarray, " cell"]
    """One exact run."""
    score: Float[np.ndarray, " cell"]
    """One score, …"""
    slope: float
    """… and for all scores of a scene together, with the run without intervention, which exact runs
    leave, too.
    """
    clean: float
    """This run alone, of a scene without scores."""

    @property
    def scene(self) -> float:
        """Before any cell is scored or run."""
        return self.slope or self.clean

    @property
    def exhaustive(self) -> float:
        """All cells, exactly."""
        return float(self.exact.sum()) + self.clean


@dataclass(frozen=True)
class Rules:
    """Settings of a race.

    Attributes:
        k: size of the top.
        scenes: in the population's sample, of which none is drawn twice.
        budget: in exhaustive sweeps of one scene.
        sample: cells beyond the entrants that are run in the first round, at most; drawn at random.
        tolerance: the race ends when no finalist can be larger than the weakest of the top by more.
        level: confidence of all joint statements.
        rng: seed of the sample.
    """

    k: int
    scenes: int
    budget: float
    sample: int
    tolerance: float = 0.0
    level: float = 0.95
    rng: int = 0


@dataclass
class Race:
    """Numbers of all cells, and how far each came."""

    rules: Rules
    prices: Prices
    exact: Float[np.ndarray, "cell scene"]
    scores: Float[np.ndarray, "cell scene"]
    lasted: Int[np.ndarray, " cell"]
    """Rounds that a cell was run in."""
    sampled: Bool[np.ndarray, " cell"]
    close: Bool[np.ndarray, " cell"]
    """Left for the budget's sake, while the interval still reached into the top."""
    spent: float = 0.0
    drawn: int = 0
    """Scenes of the exact runs."""
    alive: Cells = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    known: tuple[float, Estimates] | None = field(default=None, init=False, repr=False)
    """Estimates at the cost spent by then."""

    @property
    def estimates(self) -> Estimates:
        """Effects over the population."""
        if self.known is None or self.known[0] != self.spent:
            used = ~np.isnan(self.scores).all(axis=0)
            used[: self.drawn] = True
            self.known = self.spent, controlled(self.exact[:, used], self.scores[:, used])
        return self.known[1]

    @property
    def joint(self) -> Float[np.ndarray, "cell 2"]:
        """Intervals that hold together, for all cells that were run and after each round."""
        of = max(int((self.lasted > 0).sum()), 1) * ROUNDS
        return self.estimates.intervals(self.rules.level, of)

    @property
    def top(self) -> Cells:
        """The k of the last round that are expected to be largest, the largest first."""
        order = np.argsort(-self.estimates.expected_sizes()[self.alive], kind="stable")
        return self.alive[order[: self.rules.k]]

    @property
    def gap(self) -> float:
        """Bound on how much larger a finalist outside of the top may be than the weakest in it.

        Infinite on fewer than `LEAST_FINAL` scenes.
        """
        if self.estimates.scenes[self.alive].min() < LEAST_FINAL:
            return float("inf")
        low, high = sizes(self.joint)
        others = np.setdiff1d(self.alive, self.top)
        return float(max(0.0, high[others].max(initial=0.0) - low[self.top].min()))

    def missed(self, beyond: float) -> tuple[int, int, int]:
        """Cells outside of the top whose effect over the population may be larger than `beyond`.

        Returns:
            Those that were run and whose joint interval reaches beyond it; those of them in the
            random sample; and an upper bound on all, at the level of the race: half of the error is
            the intervals', half that of the hypergeometric count of the sample.
        """
        level = (1 + self.rules.level) / 2
        of = max(int((self.lasted > 0).sum()), 1) * ROUNDS
        _, high = sizes(self.estimates.intervals(level, of))
        reaches = high > beyond
        reaches[self.top] = False
        chosen = (self.lasted > 0) & ~self.sampled
        rest = ~chosen
        rest[self.top] = False
        seen = rest & self.sampled
        hits = int((reaches & seen).sum())
        most = count_bound(hits, int(seen.sum()), int(rest.sum()), level) if rest.any() else 0
        ran = int((reaches & (self.lasted > 0)).sum())
        return ran, hits, int((reaches & chosen).sum()) + most

    def pay(self, price: float) -> None:
        """Spend."""
        self.spent += price

    @property
    def left(self) -> float:
        """Rest of the budget."""
        return self.rules.budget * self.prices.exhaustive - self.spent


def sizes(
    intervals: Float[np.ndarray, "cell 2"],
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Bounds of the magnitude, from those of the effect.

    Example:
        >>> [bound.tolist() for bound in sizes(np.array([[-3.0, 1.0], [-4.0, -2.0]]))]
        [[0.0, 2.0], [3.0, 4.0]]
    """
    low, high = intervals.T
    inside = (low <= 0) & (high >= 0)
    ends = np.abs(intervals)
    return np.where(inside, 0.0, ends.min(axis=1)), ends.max(axis=1)


def run_race(oracle: Oracle, prices: Prices, rules: Rules, unscored: Sequence[int] = ()) -> Race:
    """Race all cells for the k places of the top.

    Args:
        oracle: gives exact effects and cheap scores of cells on scenes.
        prices: cost of each of these, in one unit.
        rules: size of the top, scenes at most, budget and confidence.
        unscored: cells without scores, which all enter the first round.

    Example:
        >>> class Known:
        ...     def exact(self, cells, scenes):
        ...         draws = np.random.default_rng(0).normal(size=(50, scenes.stop))
        ...         return (cells / 5)[:, None] + draws[cells][:, scenes.start :]
        ...
        ...     def scores(self, cells, scenes):
        ...         return self.exact(cells, scenes)
        >>> prices = Prices(np.ones(50), np.full(50, 0.05), 0.5, 0.1)
        >>> found = run_race(Known(), prices, Rules(k=3, scenes=40, budget=8.0, sample=5))
        >>> sorted(found.top.tolist())
        [47, 48, 49]
    """
    n = len(prices.exact)
    empty = np.full((n, rules.scenes), np.nan)
    race = Race(
        rules,
        prices,
        empty,
        empty.copy(),
        np.zeros(n, dtype=np.int64),
        np.zeros(n, dtype=bool),
        np.zeros(n, dtype=bool),
    )
    scored = np.setdiff1d(np.arange(n), unscored)
    score_all(oracle, race, scored)
    entrants = entrants_of(race, np.asarray(unscored, dtype=np.int64))
    for turn in range(ROUNDS):
        chosen = entrants if turn == 0 else survivors(race, turn, len(entrants))
        new = scenes_of_round(race, chosen, ROUNDS - turn)
        if not len(new):
            break
        if turn:
            race.close[race.alive] |= reaching(race, chosen)
        extra = sample_of(race, chosen, len(new)) if turn == 0 else chosen[:0]
        race.sampled[extra] = True
        race.alive = np.union1d(chosen, extra)
        run_round(oracle, race, new)
        if turn and race.gap <= rules.tolerance:
            break
    return race


def score_all(oracle: Oracle, race: Race, scored: Cells) -> None:
    """Score all cells that can be on as many scenes as the rules allow."""
    rules, prices = race.rules, race.prices
    if not len(scored):
        return
    one = float(prices.score[scored].sum()) + prices.scene
    most = int(SCORING * rules.budget * prices.exhaustive / one)
    scenes = range(min(max(most, LEAST_SCORED), rules.scenes))
    race.scores[scored, scenes.start : scenes.stop] = oracle.scores(scored, scenes)
    race.pay(one * len(scenes))


def entrants_of(race: Race, unscored: Int[np.ndarray, " unscored"]) -> Int[np.ndarray, " entrant"]:
    """The cells of the first round: those with the largest scores.

    Scores count by the magnitude of their mean and by their mean magnitude, for the larger of noisy
    means are those of noisier cells. There are as many as this round can give an interval; of a
    small budget more, without one.
    """
    prices, k = race.prices, race.rules.k
    scores = np.nan_to_num(race.scores)
    size = np.abs(scores).sum(axis=1) + np.abs(scores.sum(axis=1))
    order = np.argsort(-size, kind="stable")
    order = np.concatenate([unscored, order[~np.isin(order, unscored)]])
    scene = np.cumsum(prices.exact[order]) + prices.scene
    judged = int((scene * LEAST_SCENES <= race.left * (1 - SAMPLING) / ROUNDS).sum())
    tried = min(int((scene * FEWEST <= race.left / 2).sum()), 2 * FINALISTS * k)
    return order[: max(min(max(judged, tried, k), ENTRANTS * k), len(unscored))]


def scenes_of_round(race: Race, cells: Cells, rounds: int) -> range:
    """New scenes, as many as this round's share of the money pays for."""
    prices = race.prices
    one = float((prices.exact + prices.score)[cells].sum()) + prices.scene
    least = 1 if rounds == ROUNDS or race.left >= one else 0
    count = max(int(race.left / rounds / one), least)
    return range(race.drawn, min(race.drawn + count, race.rules.scenes))


def sample_of(race: Race, entrants: Cells, scenes: int) -> Cells:
    """A random sample of the other cells."""
    others = np.setdiff1d(np.arange(len(race.exact)), entrants)
    drawn = np.random.default_rng(race.rules.rng).permutation(others)[: race.rules.sample]
    paid = np.cumsum(race.prices.exact[drawn]) * scenes <= SAMPLING * race.left / ROUNDS
    return drawn[: max(int(paid.sum()), 1)]


def able_of(race: Race) -> Cells:
    """Cells of the last round whose joint interval reaches into the top."""
    low, high = sizes(race.joint)
    bar = np.sort(low[race.alive])[-min(race.rules.k, len(race.alive))]
    return race.alive[high[race.alive] >= bar]


def reaching(race: Race, chosen: Cells) -> Bool[np.ndarray, " alive"]:
    """Which cells of the last round leave although their interval reaches into the top."""
    return np.isin(race.alive, np.setdiff1d(able_of(race), chosen))


def survivors(race: Race, turn: int, entrants: int) -> Cells:
    """The larger half of the last round, without those whose interval ends below the top's."""
    k = race.rules.k
    last = min(FINALISTS * k, entrants)
    keep = max(round(entrants * (last / entrants) ** (turn / (ROUNDS - 1))), min(k, entrants))
    able = able_of(race)
    order = able[np.argsort(-race.estimates.expected_sizes()[able], kind="stable")]
    return order[: max(keep, k)]


def run_round(oracle: Oracle, race: Race, scenes: range) -> None:
    """Score and run the cells that are left on new scenes."""
    cells, prices = race.alive, race.prices
    columns = slice(scenes.start, scenes.stop)
    scored = cells[~np.isnan(race.scores[cells]).all(axis=1)]
    known = int((~np.isnan(race.scores[scored])).all(axis=0).sum()) if len(scored) else scenes.stop
    new = range(max(scenes.start, known), scenes.stop)  # scenes are scored in order
    if len(new):
        race.scores[scored, new.start : new.stop] = oracle.scores(scored, new)
        race.pay((float(prices.score[scored].sum()) + prices.slope) * len(new))
    race.exact[cells, columns] = oracle.exact(cells, scenes)
    clean = 0.0 if len(scored) and prices.slope else prices.clean
    race.pay((float(prices.exact[cells].sum()) + clean) * len(scenes))
    race.lasted[cells] += 1
    race.drawn = scenes.stop


__all__: Sequence[str] = ["Oracle", "Prices", "Race", "Rules", "run_race"]
