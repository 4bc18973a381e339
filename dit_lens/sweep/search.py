"""Two stages: every condition is scored by attribution, and the promising ones, with a random sample, are run exactly.

    found = sweep.two_stage(plan, "height", k=20, sample=40)
    found.table                # one row a condition: score, exact effect where there is one, and why it was run
    found.spearman             # how far the scores are true, over the random sample
    found.missed()             # how many conditions may have been passed over, at 95 % confidence

A score is, to first order, what the intervention changes: Σ (edited − clean) · ∂metric/∂activation, summed over all that it
touches, at the runs without intervention. This is attribution patching (see `dit_lens.attribution`) with the sweep's own edits in
the place of a second run. A knocked-out key is scored by what becomes of the pattern, for a masked score is no small change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models.names import FINAL
from hooked_models.trajectory import Inputs, Trajectory

from ..edits import Edit
from ..paired_runs import LATENT, chain, gradients, modulates
from ..shards import Shards
from ..stats import Interval, count_bound, rank_correlation
from .clean import made_of
from .execute import metric_of
from .metrics import OWN, Metric, Read, fingerprint
from .plan import Plan
from .progress import progress_bar
from .treatments import Treatment


class Missed(NamedTuple):
    """What the conditions that were not run may hold, judged by the random sample (each bound at the level asked for)."""

    beyond: float
    """An effect's size."""
    sampled: int
    """Conditions outside of the top with a larger effect, that the sample came upon."""
    most: int
    """Of those that were not run, at most so many have a larger effect."""
    largest: float
    """The largest effect in the sample outside of the top …"""
    most_larger: int
    """… and at most so many of those that were not run lie above it."""


@dataclass(frozen=True)
class Search:
    """What `two_stage` found."""

    found: xr.Dataset
    """Of the conditions that were run, as `sweep.run` gives it."""
    table: pd.DataFrame
    """One row a condition, the largest score first: `intervention`, `layer`, `head`, `step`; `score`; `drawn`: "top", "sample" or
    "unscored" for those that were run, "" for others; and `exact`, `low`, `high`, their effect with its interval."""
    spearman: Interval
    """Rank correlation of scores and exact effects over the random sample of all scored conditions."""
    p: float
    of_sizes: Interval
    """The same of magnitudes, by which the top is chosen: an effect's size can be foreseen where its sign cannot."""
    in_sample: Sequence[bool]
    """Row by row of the table: those in the top can be in the sample too."""

    def missed(self, rank: int | None = None, level: float = 0.95) -> Missed:
        """How many conditions that were not run may have a larger effect than the `rank`-th largest of the top (its last).

        The sample is drawn before any effect is known, so the numbers of hits are hypergeometric and the bounds exact.

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
        most, larger = (count_bound(seen, len(drawn), int(rest.sum()), level) - seen for seen in (hits, 0))
        return Missed(float(sizes[rank - 1]), hits, most, largest, larger)


@torch.no_grad()
def two_stage(
    plan: Plan,
    metric: str,
    k: int = 20,
    sample: int = 40,
    by: Callable[[Tensor], Tensor] | None = None,
    out: str | Path | None = None,
    executor: str = "local",
    workers: int | None = None,
    rng: int = 0,
) -> Search:
    """Score all conditions of a plan by attribution, and run the `k` largest and a random `sample` of all, exactly.

    Args:
        metric: whose effect is looked for; of a metric with several values, one of them ("scene_relation_loose").
        by: what is differentiated in its place: a function of the same tensor [batch …] → [batch]. For metrics that have no
            slope: counts, verdicts, and distances from the run without intervention, which are smallest there.
        out: a folder, in which a search that was stopped goes on.
        executor, workers: of the exact runs, as in `sweep.run`.
        rng: seed of the sample.

    Conditions that attribution has no score for (on the text encoder, the image, or the timestep's modulation, which depends
    on no prompt; on the latent that an ε is taken of) are run exactly too.

    Raises:
        TypeError: the metric cannot be differentiated.
        ValueError: there is no such metric, it has no slope where it is taken, or k or sample is not positive.
    """
    name = metric_of(plan, metric)
    if name is None:
        raise ValueError(f"The plan has no metric {metric!r}: it has {', '.join(plan.metrics)}.")
    if k < 1 or sample < 1:
        raise ValueError(f"k={k}, sample={sample}: both have to be at least 1.")
    folder = None if out is None else Path(out)
    scores = _scores(plan, name, metric.removeprefix(name).removeprefix("_"), by, folder)
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
    found = exact.run(folder and folder / f"top {k}, sample {sample}, seed {rng}", executor, workers)
    effects = np.full((len(scores), 3), np.nan)
    effects[run] = found[f"{metric}_effect"].values
    pairs = scores[in_sample], effects[in_sample, 0]
    rho, (of_sizes, _) = rank_correlation(*pairs), rank_correlation(*map(np.abs, pairs))
    table = pd.DataFrame(
        {
            "intervention": [one.label for one in plan.treatments],
            **{key: [one.coords[key] for one in plan.treatments] for key in ("layer", "head", "step")},
            "score": scores,
            "drawn": drawn,
            **dict(zip(("exact", "low", "high"), effects.T, strict=True)),
        }
    )
    order = np.concatenate([order, np.flatnonzero(np.isnan(scores))])
    return Search(found, table.iloc[order].reset_index(drop=True), *rho, of_sizes, in_sample[order].tolist())


def _scores(
    plan: Plan, name: str, column: str, by: Callable[[Tensor], Tensor] | None, folder: Path | None
) -> Float[np.ndarray, " condition"]:
    """Means over prompts and seeds; NaN where attribution has none."""
    metric = plan.metrics[name] if by is None else Metric(by)
    settings = {} if folder is None else {**plan.settings, "attribution": fingerprint([metric, plan.reads[name], column])}
    shards = None if folder is None else Shards(folder, settings)
    of_seeds = []
    with progress_bar(plan.cells, plan.runs, disable=plan.runs <= plan.batch) as told:
        for i, seed in enumerate(plan.seeds):
            make = partial(_of_seed, plan, plan.reads[name], metric, column, seed, told.worked)
            of_seeds.append(make(i) if shards is None else shards.load_or(i, make))
    values = np.stack(of_seeds)  # [seed condition prompt]
    scored = ~np.isnan(values).any(axis=(0, 2))
    if scored.any() and not np.any(values[:, scored]):
        raise ValueError(
            f"{name} has no slope at the runs without intervention: all scores are 0. Distances from these runs are such; give "
            "by=, a function of the same tensor that goes up or down with what you look for."
        )
    return np.where(scored, values.mean(axis=(0, 2)), np.nan)


def _of_seed(
    plan: Plan, read: Read, metric: Metric, column: str, seed: int, done: Callable[[int], None], _: int = 0
) -> Float[np.ndarray, "condition prompt"]:
    n, tokens = len(plan.prompts), plan.model.to_tokens(plan.prompts)
    unscored = np.array([not _scorable(treatment, read) for treatment in plan.treatments])
    found = np.zeros((len(plan.treatments), n))
    found[unscored] = np.nan
    together = any(one.joint for one in plan.treatments)  # "mean" and "resample" look at all prompts
    for rows in [np.arange(n)] if together else np.array_split(np.arange(n), -(-n // plan.batch)):
        run = plan.model.trajectory(tokens[rows], seed, plan.num_steps, plan.guidance)
        for first, some in _questions(plan, read, np.flatnonzero(~unscored)):
            found[np.ix_(some, rows)] = _first_order(plan, run, first, read, metric, column, rows, some)
        done(len(rows))
    return found


def _scorable(treatment: Treatment, read: Read) -> bool:
    """Whether all that it touches lies on the way from a run's inputs to its result, step by step."""
    own = read.at(treatment.first).step if read.inner == "eps" else None  # made of the latent twice, once beside the network
    sites = [edit.site for edit in treatment.edits]
    return all(
        site.step is not None and not modulates(site.inner) and (site.inner, site.step) != ("hook_latent", own) for site in sites
    )


def _questions(plan: Plan, read: Read, which: Int[np.ndarray, " _"]) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
    """(first step of a chain, conditions that it is about); where a metric is taken at the first touched step, one each."""
    firsts = np.array([plan.treatments[i].first for i in which.tolist()], dtype=np.int64)
    if read.step == OWN:
        for first in np.unique(firsts):
            yield int(first), which[firsts == first]
    else:
        seen = which[firsts <= plan.num_steps if read.step is None else firsts <= read.step]
        if len(seen):
            yield int(firsts.min()), seen


def _first_order(
    plan: Plan,
    run: Trajectory,
    first: int,
    read: Read,
    metric: Metric,
    column: str,
    rows: Int[np.ndarray, " prompt"],
    some: Int[np.ndarray, " condition"],
) -> Float[np.ndarray, "condition prompt"]:
    """Σ (edited − clean) · gradient, of the conditions `some`."""
    last = plan.num_steps - (read.inner == LATENT) if read.step is None else read.at(first).step
    assert last is not None
    one = chain(run, first, last, (LATENT,) if read.inner == LATENT else read.hooks, partial(_read, read.at(first), run.inputs))
    baseline = one.output.detach()

    def differentiable(tensor: Tensor) -> Tensor:
        found = metric.function(tensor, **{key: value for key, value in offered.items() if key in metric.given})
        return found[column] if isinstance(found, Mapping) else found  # type: ignore[return-value]

    offered: dict[str, Any] = {"baseline": baseline, "prompt": rows}
    edits: dict[int, list[tuple[int, str, list[Edit]]]] = {}  # segment → (place in `some`, hook, what is done there in turn)
    for place, condition in enumerate(some.tolist()):
        for step, here in plan.treatments[condition].at.items():
            if step > last:
                continue
            by_hook: dict[str, list[Edit]] = {}
            for edit in here:
                by_hook.setdefault(_hook(edit), []).append(edit)
            edits.setdefault(step - first, []).extend((place, name, several) for name, several in by_hook.items())
    names = {segment: list(dict.fromkeys(name for _, name, _ in parts)) for segment, parts in edits.items()}
    scores, index = np.zeros((len(some), len(rows))), torch.from_numpy(rows)
    for segment, gradient in gradients([(one, 1.0)], names, differentiable):
        clean = one.activations(segment, names[segment])
        for place, name, several in edits[segment]:
            edited = clean[name]
            for edit in several:
                edited = _edited(edit if len(rows) == len(plan.prompts) else edit.take(index), edited)
            change = (edited - clean[name]) * gradient[name]
            scores[place] += change.flatten(1).sum(dim=1, dtype=torch.float64).cpu().numpy()
    return scores


def _read(read: Read, inputs: Inputs, kept: Mapping[str, Tensor]) -> Tensor:
    return kept[read.inner] if read.inner in (FINAL, LATENT) else made_of(dict(kept), read, inputs)


def _hook(edit: Edit) -> str:
    """Where an edit is scored: a masked attention score by the pattern that comes of it."""
    return edit.site.name.replace("hook_attn_scores", "hook_pattern") if edit.action == "knockout" else edit.site.name


def _edited(edit: Edit, clean: Tensor) -> Tensor:
    if edit.action != "knockout":
        return edit(clean)
    kept = clean.masked_fill(edit.where, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)
