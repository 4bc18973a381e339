"""Two stages: every condition is scored by an estimate, and the promising ones, with a random
sample, are run exactly.

    found = sweep.two_stage(plan, "height", k=20, sample=40)
    found.table  # one row a condition: score, exact effect if it was run, and the reason for that
    found.spearman  # how far the scores are true, over the random sample
    found.missed()  # how many conditions may have been passed over, at 95 % confidence

How scores are made: `dit_lens.sweep.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..stats import Interval, count_bound, rank_correlation
from ..store import Store, fingerprint
from .cluster import Cluster
from .execute import Here, metric_of
from .metrics import FIRST_TOUCHED, Metric
from .plan import Plan, cluster_of
from .progress import progress_bar
from .scores import Method, Question, groups_of_prompts


class Missed(NamedTuple):
    """Bounds on the effects of conditions that were not run, from the random sample (each at the
    given level).

    Example:
        >>> from dit_lens import Intervention, sweep
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> cells = sweep.grid(
        ...     Intervention("blocks.*.cross_attn.hook_z"), layers=range(3), steps=[0]
        ... )
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> sweep.two_stage(plan, "red", k=1, sample=3).missed().most  # all three were run
        0
    """

    beyond: float
    """An effect's size."""
    sampled: int
    """Conditions outside of the top with a larger effect, that the sample came upon."""
    most: int
    """Upper bound on the number of conditions that were not run and have a larger effect."""
    largest: float
    """The largest effect in the sample outside of the top …"""
    most_larger: int
    """… and at most so many of those that were not run lie above it."""


class Running(TypedDict, total=False):
    """Keyword arguments of the exact runs of `two_stage`, as in `sweep.run`.

    Attributes:
        executor: "local" by default.
        workers: of "ray".
    """

    executor: str
    workers: int | None


@dataclass(frozen=True)
class Search:
    """Scores of all conditions and exact effects of some; returned by `two_stage`.

    Example:
        >>> from dit_lens import Intervention, sweep
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> cells = sweep.grid(
        ...     Intervention("blocks.*.cross_attn.hook_z"), layers=range(3), steps=[0]
        ... )
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> sweep.two_stage(plan, "red", k=1, sample=2).table["drawn"].tolist()[0]
        'top'
    """

    found: xr.Dataset
    """Results of the conditions that were run, as `sweep.run` gives them."""
    table: pd.DataFrame
    """One row a condition, the largest score first: `intervention`, `layer`, `head`, `step`;
    `score`; `drawn`: "top", "sample" or "unscored" for those that were run, "" for others; and
    `exact`, `low`, `high`, their effect with its interval.
    """
    spearman: Interval
    """Rank correlation of scores and exact effects over the random sample of all scored
    conditions.
    """
    p: float
    of_sizes: Interval
    """The same of magnitudes, by which the top is chosen: an effect's size can be foreseen where
    its sign cannot.
    """
    in_sample: Sequence[bool]
    """Row by row of the table: those in the top can be in the sample too."""

    def missed(self, rank: int | None = None, level: float = 0.95) -> Missed:
        """How many conditions that were not run may have a larger effect than the `rank`-th largest
        of the top (its last).

        The sample is drawn before any effect is known, so the numbers of hits are hypergeometric
        and the bounds exact.

        Raises:
            ValueError: the top has no such rank.
        """
        top, sampled = self.table["drawn"] == "top", np.asarray(self.in_sample)
        sizes = np.sort(self.table.loc[top, "exact"].abs().to_numpy())[::-1]
        rank = len(sizes) if rank is None else rank
        if not 1 <= rank <= len(sizes):
            raise ValueError(f"rank={rank}: the top has ranks 1 to {len(sizes)}.")
        rest = self.table["drawn"].isin(["sample", ""]).to_numpy()
        drawn = self.table["exact"].abs().to_numpy()[rest & sampled]
        hits, largest = int((drawn > sizes[rank - 1]).sum()), float(drawn.max(initial=0.0))
        most, larger = (
            count_bound(seen, len(drawn), int(rest.sum()), level) - seen for seen in (hits, 0)
        )
        return Missed(float(sizes[rank - 1]), hits, most, largest, larger)


@torch.no_grad()
def two_stage(
    plan: Plan,
    metric: str,
    k: int = 20,
    sample: int = 40,
    by: Callable[[Tensor], Tensor] | None = None,
    out: str | Path | None = None,
    rng: int = 0,
    score: Method | None = None,
    **running: Unpack[Running],
) -> Search:
    """Score all conditions of a plan by an estimate, and run the `k` largest and a random `sample`
    of all, exactly.

    Args:
        metric: whose effect is looked for; of a metric with several values, one of them
            ("scene_relation_loose").
        by: a differentiable stand-in: a function of the same tensor [batch …] → [batch]. For
            metrics that have no slope: counts, verdicts, and distances from the run without
            intervention, which are smallest there.
        out: a folder, in which a search that was stopped goes on.
        rng: seed of the sample.
        score: "step", each touched step exactly and first order from there on, which finds effects
            that attention's saturation hides from gradients; or "attribution", first order
            throughout, whose cost does not grow with the number of conditions. Unless given,
            "step", but for a metric that is taken at the touched step itself, where it would save
            nothing.

    Conditions that have no score (on the text encoder or the image; by attribution, on the
    timestep's modulation, which depends on no prompt, and on the latent that an ε is taken of) are
    run exactly too. Those on tensors between denoiser calls are scored by attribution.

    Raises:
        TypeError: the metric cannot be differentiated.
        ValueError: there is no such metric, it has no slope where it is taken, or k or sample is
            not positive.

    Example:
        >>> from dit_lens import Intervention, sweep
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> cells = sweep.grid(
        ...     Intervention("blocks.*.cross_attn.hook_z"), layers=range(3), steps=[0]
        ... )
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> found = sweep.two_stage(plan, "red", k=1, sample=2)
        >>> len(found.table), "red_effect" in found.found
        (3, True)
    """
    name = metric_of(plan, metric)
    if name is None:
        raise ValueError(f"The plan has no metric {metric!r}: it has {', '.join(plan.metrics)}.")
    if k < 1 or sample < 1:
        raise ValueError(f"k={k}, sample={sample}: both have to be at least 1.")
    folder = None if out is None else Path(out)
    way = score or ("attribution" if plan.reads[name].step == FIRST_TOUCHED else "step")
    slope = plan.metrics[name] if by is None else Metric(by)
    question = Question(name, slope, metric.removeprefix(name).removeprefix("_"), way)
    with cluster_of(plan, **running) as cluster:
        scores = _scores(plan, question, folder, cluster)
        scored = np.flatnonzero(~np.isnan(scores))
        order = scored[np.argsort(-np.abs(scores[scored]), kind="stable")]
        drawn = np.full(len(scores), "unscored", dtype=object)
        drawn[scored] = ""
        in_sample = np.zeros(len(scores), dtype=bool)
        in_sample[np.random.default_rng(rng).permutation(scored)[:sample]] = True
        drawn[in_sample] = "sample"
        drawn[order[:k]] = "top"

        run = np.flatnonzero(drawn != "")
        exact = replace(plan, treatments=[plan.treatments[i] for i in run.tolist()])
        where = folder and folder / f"top {k}, sample {sample}, seed {rng}"
        found = exact.run_by(cluster, where)
    effects = np.full((len(scores), 3), np.nan)
    effects[run] = found[f"{metric}_effect"].values
    pairs = scores[in_sample], effects[in_sample, 0]
    rho, (of_sizes, _) = rank_correlation(*pairs), rank_correlation(*map(np.abs, pairs))
    table = pd.DataFrame(
        {
            "intervention": [one.label for one in plan.treatments],
            **{
                key: [one.coords[key] for one in plan.treatments]
                for key in ("layer", "head", "step")
            },
            "score": scores,
            "drawn": drawn,
            **dict(zip(("exact", "low", "high"), effects.T, strict=True)),
        }
    )
    order = np.concatenate([order, np.flatnonzero(np.isnan(scores))])
    return Search(
        found, table.iloc[order].reset_index(drop=True), *rho, of_sizes, in_sample[order].tolist()
    )


def _scores(
    plan: Plan, question: Question, folder: Path | None, cluster: Cluster | None
) -> Float[np.ndarray, " condition"]:
    """Means over prompts and seeds; NaN where there is none."""
    name = question.name
    asked = [question.metric, plan.reads[name], question.column, question.by]
    settings = {} if folder is None else {**plan.settings, "scores": fingerprint(asked)}
    with (
        progress_bar(plan.cells, plan.runs, disable=plan.runs <= plan.batch) as advance,
        nullcontext() if folder is None else Store(folder, settings) as store,
    ):

        def make(seed: int) -> Float[np.ndarray, "condition prompt"]:
            groups = groups_of_prompts(plan, 1 if cluster is None else cluster.count)
            team = Here(plan, advance.rows) if cluster is None else cluster.team(len(groups))
            parts = []
            for prompts, part in zip(groups, team.scores(question, seed, groups), strict=True):
                parts.append(part)
                advance.rows(len(prompts))
            return np.concatenate(parts, axis=1)

        seeds = range(len(plan.seeds))
        of_seeds = [
            make(seed) if store is None else store.array(f"{seed:08d}.npy", partial(make, seed))
            for seed in seeds
        ]
    values = np.stack(of_seeds)  # [seed condition prompt]
    scored = ~np.isnan(values).any(axis=(0, 2))
    if scored.any() and not np.any(values[:, scored]):
        raise ValueError(
            f"{name} has no slope at the runs without intervention: all scores are 0. Distances "
            "from these runs are such; give "
            "by=, a function of the same tensor that goes up or down with what you look for."
        )
    return np.where(scored, values.mean(axis=(0, 2)), np.nan)
