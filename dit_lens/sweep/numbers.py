"""A plan as the oracle of a search: scores, effects and their cost, from runs or from disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from ..store import Store, digest, fingerprint
from .clean import CleanRuns
from .cluster import Cluster
from .execute import Execution, Here, depends_on_condition
from .plan import Plan
from .race import Cells, Prices, Rules
from .results import Results, dataset
from .scores import Question, has_score

CHAIN = 3.5
"""A run and the gradient through it, in runs without intervention: the run, each call again, with a
graph, and back (measured: 3.4 to 3.6 for 504 cells of 4 scenes).
"""


def prices(plan: Plan, question: Question) -> Prices:
    """Cost of a search's parts in row-layers (`dit_lens.sweep.cost`), before it runs."""
    layers, branches = plan.model.cfg.n_layers, 1 + plan.extent.guided
    clean = float(plan.steps * branches * layers)
    exact, score = np.zeros(len(plan.conditions)), np.zeros(len(plan.conditions))
    for place, condition in enumerate(plan.conditions):
        until = plan.until(condition)
        if until is not None and until > condition.first:
            begun = sum(layers - layer for layer in _starts(plan, place, condition.first))
            exact[place] = begun + (until - condition.first - 1) * branches * layers
        if question.by == "step":
            score[place] = sum(
                layers - layer for step in condition.at for layer in _starts(plan, place, step)
            )
    return Prices(exact, score, 0.0 if question.by == "none" else CHAIN * clean, clean)


def _starts(plan: Plan, place: int, step: int) -> list[int]:
    """Layers that a condition begins at in a step, branch by branch."""
    condition, layers = plan.conditions[place], plan.model.cfg.n_layers
    found = condition.starts(layers, step)
    return [layer if plan.model.enters_at_layers else 0 for layer in found.values()]


def order_of_scenes(prompts: int, seeds: int, rng: int) -> Int[np.ndarray, " row"]:
    """Rows of a plan in the order in which a search draws them.

    All prompts at random, with different seeds, before any comes again.

    Example:
        >>> order_of_scenes(3, 2, rng=0).tolist()
        [2, 3, 1, 5, 0, 4]
    """
    drawn = np.random.default_rng(rng).permutation(prompts)
    turns, places = np.divmod(np.arange(prompts * seeds), prompts)
    return (turns + places) % seeds * prompts + drawn[places]


class Numbers:
    """A plan as the race's oracle.

    Scenes are its rows in a random order. Scores and results are on disk if there is a folder, and
    are not computed again.
    """

    def __init__(
        self,
        plan: Plan,
        metric: str,
        question: Question,
        rules: Rules,
        cluster: Cluster | None,
        folder: Path | None,
    ) -> None:
        self.plan, self.metric, self.question, self.cluster = plan, metric, question, cluster
        self.rows = order_of_scenes(len(plan.prompts), len(plan.seeds), rules.rng)
        read = plan.reads[question.name]
        self.unscored = [
            place
            for place, condition in enumerate(plan.conditions)
            if not has_score(condition, read, question.by)
        ]
        self.here = Here(plan, lambda rows: None)
        self.clean: CleanRuns | None = None
        """Runs that were sampled for scores."""
        self.store: Store | None = None
        if folder is not None:
            asked = [question.metric, read, question.column, question.by]
            self.store = Store(folder / "scores", {**plan.settings, "scores": fingerprint(asked)})
        try:
            self.results = Results(
                folder and folder / "cells", {} if folder is None else plan.settings
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Write the results that are not on disk yet."""
        if self.store is not None:
            self.store.close()
        if hasattr(self, "results"):
            self.results.close()

    def scores(self, cells: Cells, scenes: range) -> Float[np.ndarray, "cell scene"]:
        """As in `race.Oracle`."""
        rows = np.sort(self.rows[scenes.start : scenes.stop])
        question = replace(self.question, conditions=tuple(cells.tolist()))
        groups = self._groups(cells, rows)
        names = [f"{digest(str(group.tolist()), str(cells.tolist()))}.npy" for group in groups]
        parts = {name: self._kept(name) for name in names}
        new = [place for place, name in enumerate(names) if parts[name] is None]
        if new:
            team = self.here if self.cluster is None else self.cluster.team(len(new))
            made = team.scores(question, [groups[place] for place in new])
            for place, (part, clean) in zip(new, made, strict=True):
                parts[names[place]] = part
                self.clean = CleanRuns.merged([clean, self.clean] if self.clean else [clean])
                if self.store is not None:
                    self.store.array(names[place], partial(np.asarray, part))
        values = np.concatenate([parts[name] for name in names], axis=1)
        known = np.concatenate(groups)
        if not np.any(values):
            raise ValueError(
                f"{self.question.name} has no slope at the runs without intervention: all scores "
                "are 0. Distances from these runs are such; give by=, a function of the same "
                "tensor that goes up or down with what you look for, or score='none'."
            )
        return values[:, np.searchsorted(known, self.rows[scenes.start : scenes.stop])]

    def _groups(self, cells: Cells, rows: Int[np.ndarray, " row"]) -> list[np.ndarray]:
        """Rows that are scored in one batch."""
        plan = self.plan
        if any(plan.conditions[place].joint for place in cells.tolist()):
            n = len(plan.prompts)  # a condition that mixes prompts has all of them in its run
            return [seed * n + np.arange(n) for seed in np.unique(rows // n)]
        workers = 1 if self.cluster is None else self.cluster.count
        most = min(plan.batch, -(-len(rows) // workers))
        return np.array_split(rows, -(-len(rows) // most))

    def _kept(self, name: str) -> np.ndarray | None:
        if self.store is None or name not in self.store:
            return None
        return self.store.array(name, lambda: None)

    def exact(self, cells: Cells, scenes: range) -> Float[np.ndarray, "cell scene"]:
        """As in `race.Oracle`."""
        plan, rows = self.plan, self.rows[scenes.start : scenes.stop]
        numbers = cells[:, None] * plan.runs + rows
        done = np.ones(plan.cells, dtype=bool)
        done[numbers.ravel()] = False
        done[self.results.done] = True
        if not done.all():
            Execution(plan, self.results, done, self.clean).run(self.cluster)
            self.results.flush()
        table = self.results.table.drop_duplicates("cell").set_index("cell")
        effects = table[self.metric] - table[f"{self.metric}_baseline"]
        return effects.loc[numbers.ravel()].to_numpy(dtype=float).reshape(numbers.shape)

    def found(self) -> xr.Dataset:
        """Results of the conditions that were run."""
        plan, table = self.plan, self.results.table.drop_duplicates("cell")
        own = {column: depends_on_condition(plan, column) for column in table.columns}
        attrs = {"num_steps": plan.num_steps, "guidance": plan.guidance}
        whole = dataset(table, plan.conditions, plan.prompts, plan.seeds, own, attrs)
        return whole.isel(intervention=np.unique(table["cell"].to_numpy() // plan.runs))
