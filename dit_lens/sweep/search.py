"""Search of a plan for the conditions with the largest mean effects.

Over the population that its prompts and seeds are drawn from.

    plan = sweep.plan(model, prompts, seeds, cells, {"height": height})  # of many prompts
    found = sweep.search(plan, "height", k=10, budget=8)
    found.table      # one row a condition: effect, joint interval, and how far it came
    found.missed()   # how many others may have a larger effect over the population
    print(found)     # the guarantee, in words

A sweep of few prompts ranks noise. At the cost of such a sweep, a search scores all conditions,
runs the promising ones, and spends the rest of the budget on fewer and fewer, on new scenes
(pairs of a prompt and a seed): see `dit_lens.sweep.race`. Scores: `dit_lens.sweep.scores`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from ..stats import Interval, rank_correlation
from .execute import metric_of
from .metrics import Metric
from .numbers import Numbers, prices
from .plan import Plan, cluster_of
from .race import Race, Rules, run_race
from .scores import Method, Question

BUDGET = 8.0


class Missed(NamedTuple):
    """Conditions outside of the top that may have a larger effect over the population.

    Example:
        >>> Missed(beyond=0.5, run=2, sampled=1, most=9).most
        9
    """

    beyond: float
    """Size of an effect: the estimate of one of the top."""
    run: int
    """Conditions that were run, outside of the top, whose joint interval reaches beyond it."""
    sampled: int
    """Those of them in the random sample."""
    most: int
    """Upper bound on all, run or not."""


class Searching(TypedDict, total=False):
    """Keyword arguments of `search`.

    Attributes:
        budget: cost at most, in exhaustive sweeps of one scene; 8, or all scenes, by default.
        sample: conditions beyond the promising ones that are run, at most; drawn at random, for
            the bound of `missed`; 20 by default.
        tolerance: end before the budget is spent, once no finalist can be larger than the weakest
            of the top by more.
        level: confidence of the guarantee, 0.95 by default.
        rng: seed of the order of scenes and of the sample.
        score: "attribution", first order throughout, whose cost does not grow with the number of
            conditions, the default; "step", each touched step exactly and first order from there;
            or "none": all conditions are run in the first round.
        by: a differentiable stand-in for the metric: a function of the same tensor
            [batch …] → [batch]. For metrics without a slope: counts, verdicts, and distances
            from the run without intervention, which are smallest there.
        executor: "local" (default) or "ray", as in `sweep.run`.
        workers: of "ray".

    Example:
        >>> how: Searching = {"budget": 2.0, "score": "step"}
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", [0, 1], cells, {"red": red}, num_steps=2
        ... )
        >>> sweep.search(plan, "red", k=1, **how).race.rules.budget
        2.0
    """

    budget: float
    sample: int
    tolerance: float
    level: float
    rng: int
    score: Method
    by: Callable[[Tensor], Tensor]
    executor: str
    workers: int | None


@dataclass(frozen=True)
class Search:
    """Result of `search`.

    Example:
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", [0, 1], cells, {"red": red}, num_steps=2
        ... )
        >>> sweep.search(plan, "red", k=1).table["drawn"].tolist()[0]
        'top'
    """

    found: xr.Dataset
    """Results of the conditions that were run, as `sweep.run` gives them; NaN on scenes on which
    they were not.
    """
    table: pd.DataFrame
    """One row a condition, the top first: `intervention`, `layer`, `head`, `step`; `score`, the
    mean; `drawn`: "top", "entrant" or "sample" for those that were run, "" for others; `exact`,
    the estimated effect over the population, with `low` and `high`, widened for the number of
    conditions (Bonferroni), infinite on fewer than eight scenes; heavier tails than Student's make
    them too short for some; `scenes` and `rounds` that it was run on; and `close`, True if it
    left for the budget's sake while its interval still reached into the top.
    """
    race: Race

    @property
    def spearman(self) -> Interval:
        """Rank correlation of scores and effects over the random sample."""
        return rank_correlation(*self._pairs())[0]

    @property
    def of_sizes(self) -> Interval:
        """The same of magnitudes."""
        return rank_correlation(*map(np.abs, self._pairs()))[0]

    @property
    def spent(self) -> float:
        """Cost, in exhaustive sweeps of one scene."""
        return self.race.spent / self.race.prices.exhaustive

    @property
    def gap(self) -> float:
        """Bound on how much larger than the weakest of the top another condition may be.

        Over the population, among the conditions of the last round.
        """
        return self.race.gap

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        sampled = self.table[self.table["drawn"] == "sample"]
        return sampled["score"].to_numpy(), sampled["exact"].to_numpy()

    def missed(self, rank: int | None = None) -> Missed:
        """Bound the number of conditions outside of the top that belong to it.

        Their effect over the population is larger than the estimate of the `rank`-th of the top
        (its smallest, by default). Holds at the level of the search: half of the error is that of
        the joint intervals, half that of the hypergeometric count of a random sample of the
        conditions that did not enter.

        Raises:
            ValueError: the top has no such rank.
        """
        top = np.sort(np.abs(self.race.estimates.mean[self.race.top]))[::-1]
        rank = len(top) if rank is None else rank
        if not 1 <= rank <= len(top):
            raise ValueError(f"rank={rank}: the top has ranks 1 to {len(top)}.")
        return Missed(float(top[rank - 1]), *self.race.missed(float(top[rank - 1])))

    def __str__(self) -> str:
        """The guarantee, in words."""
        race, missed = self.race, self.missed()
        ends = "reached" if self.gap <= race.rules.tolerance else "not reached: the budget is spent"
        gap = (
            f"no other finalist is larger than the weakest of these by more than {self.gap:.3g} "
            f"(tolerance {race.rules.tolerance:g} {ends})"
            if np.isfinite(self.gap)
            else "nothing can be said about other finalists (too few scenes)"
        )
        return (
            f"{len(race.top)} of {len(self.table)} conditions, {race.drawn} scenes, at the cost of "
            f"{self.spent:.2g} exhaustive ones. Over the population, at {race.rules.level:.0%} "
            f"confidence, {gap}, and at most {missed.most} other conditions have an effect beyond "
            f"{missed.beyond:.3g}."
        )


@torch.no_grad()
def search(
    plan: Plan, metric: str, k: int = 10, out: str | Path | None = None, **how: Unpack[Searching]
) -> Search:
    """Find the k conditions with the largest mean effects over the population of scenes.

    Args:
        plan: of as many prompts and seeds as can be drawn from the population; a search uses those
            that its budget pays for.
        metric: whose effect is looked for; of a metric with several values, one of them
            ("scene_relation_loose").
        k: size of the top.
        out: a folder, in which a search that was stopped goes on.
        **how: see `Searching`.

    Conditions that have no score (on the text encoder or the image; by attribution, on the
    timestep's modulation and on the latent that an ε is taken of) all enter the first round.

    Raises:
        TypeError: the metric cannot be differentiated.
        ValueError: there is no such metric, it has no slope where it is taken, or a number is out
            of range.

    Example:
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", [0, 1], cells, {"red": red}, num_steps=2
        ... )
        >>> found = sweep.search(plan, "red", k=1)
        >>> len(found.table), found.missed().most
        (3, 2)
    """
    name = metric_of(plan, metric)
    if name is None:
        raise ValueError(f"The plan has no metric {metric!r}: it has {', '.join(plan.metrics)}.")
    rules = _rules(plan, k, how)
    by = how.get("by")
    slope = plan.metrics[name] if by is None else Metric(by)
    column = metric.removeprefix(name).removeprefix("_")
    question = Question(name, slope, column, how.get("score", "attribution"))
    with cluster_of(plan, how.get("executor", "local"), how.get("workers")) as cluster:
        numbers = Numbers(
            plan, metric, question, rules, cluster, None if out is None else Path(out)
        )
        try:
            race = run_race(numbers, prices(plan, question), rules, numbers.unscored)
            found = numbers.found()
        finally:
            numbers.close()
    return Search(found, _table(plan, race), race)


def two_stage(
    plan: Any,
    metric: str,
    k: int = 20,
    sample: int = 40,
    out: str | Path | None = None,
    **how: Any,
) -> Search:
    """Former name of `search`, on all scenes of the plan; `sample` is one of its options.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     try:
        ...         two_stage(None, "red")
        ...     except AttributeError:
        ...         print(caught[0].category.__name__)
        DeprecationWarning
    """
    warnings.warn(
        "two_stage is sweep.search now, which ranks by the population of scenes: "
        "sweep.search(plan, metric, k, budget=…).",
        DeprecationWarning,
        stacklevel=2,
    )
    return search(plan, metric, k, out, sample=sample, **{"budget": float(plan.runs), **how})


def _rules(plan: Plan, k: int, how: Searching) -> Rules:
    sample, level = how.get("sample", 20), how.get("level", 0.95)
    budget, tolerance = how.get("budget", min(BUDGET, plan.runs)), how.get("tolerance", 0.0)
    if k < 1 or sample < 1:
        raise ValueError(f"k={k}, sample={sample}: both have to be at least 1.")
    if not budget > 0 or not 0 < level < 1 or tolerance < 0:
        raise ValueError(
            f"budget={budget}, level={level}, tolerance={tolerance}: the budget has to be above "
            "0, the level between 0 and 1, and the tolerance not below 0."
        )
    return Rules(k, plan.runs, float(budget), sample, tolerance, level, how.get("rng", 0))


def _table(plan: Plan, race: Race) -> pd.DataFrame:
    estimates, joint = race.estimates, race.joint
    drawn = np.where(race.lasted > 0, np.where(race.sampled, "sample", "entrant"), "")
    drawn[race.top] = "top"
    counts = np.maximum((~np.isnan(race.scores)).sum(axis=1), 1)
    scores = np.where(np.isnan(race.scores).all(axis=1), np.nan, np.nansum(race.scores, 1) / counts)
    ran = race.lasted > 0
    table = pd.DataFrame(
        {
            "intervention": [one.label for one in plan.conditions],
            **{
                key: [one.coords[key] for one in plan.conditions]
                for key in ("layer", "head", "step")
            },
            "score": scores,
            "drawn": drawn,
            "exact": estimates.mean,
            "low": np.where(ran, joint[:, 0], np.nan),
            "high": np.where(ran, joint[:, 1], np.nan),
            "scenes": estimates.scenes,
            "rounds": race.lasted,
            "close": race.close,
        }
    )
    others = np.setdiff1d(np.arange(len(table)), race.top)
    key = (
        race.lasted[others],
        estimates.expected_sizes()[others],
        np.abs(np.nan_to_num(scores))[others],
    )
    order = others[np.lexsort(tuple(-part for part in reversed(key)))]
    return table.iloc[np.concatenate([race.top, order])].reset_index(drop=True)
