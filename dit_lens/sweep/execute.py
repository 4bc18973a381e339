"""Running a plan: the clean runs, then forks batch by batch, each cell's metrics into the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_models.generation.trajectory import Record

from ..intervene.edits import Edit
from .clean import CleanRuns, Fork, Rows, inputs_of
from .forks import ForkBatch
from .metrics import FIRST_TOUCHED, Metric, Read
from .progress import progress_bar
from .results import Results
from .scores import Question, scores_of_rows

if TYPE_CHECKING:
    from .cluster import Cluster
    from .plan import Plan

PROGRESS_FROM = 10
"""Batches from which a progress bar is shown."""


class Measured(NamedTuple):
    """A metric in some rows."""

    values: dict[str, np.ndarray]
    """By name ("" for a metric of one value), NaN where it failed."""
    errors: np.ndarray
    """Text, empty where it did not."""


@dataclass(frozen=True)
class SweepContext:
    """Context of a batch of forks: the plan, and the metrics of the runs without intervention."""

    plan: Plan
    baselines: Mapping[tuple[str, int | None], Measured]
    """(metric, step that it is taken at) → its values, [prompt · seed]."""
    batch: int

    def on(self, model: Any) -> SweepContext:
        """The same with another, equal model; None to send it elsewhere without."""
        return replace(self, plan=replace(self.plan, model=model))

    def rows(
        self,
        clean: CleanRuns,
        forks: Sequence[Fork],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> pd.DataFrame:
        """Run forks together, in halves if memory does not suffice: the rows of their cells."""
        batch = ForkBatch(clean, self.plan.conditions, forks)
        try:
            found = batch.run(set(self.plan.reads.values()), advance)
        except torch.OutOfMemoryError:
            if len(forks) == 1:
                raise
            half = len(forks) // 2
            return pd.concat(
                [self.rows(clean, some, advance) for some in (forks[:half], forks[half:])],
                ignore_index=True,
            )
        return self.table(
            np.concatenate([self.plan.cells_of(fork) for fork in forks]), batch, found
        )

    def table(
        self, cells: Int[np.ndarray, " cell"], batch: ForkBatch | None, found: Mapping[Read, Tensor]
    ) -> pd.DataFrame:
        """Rows of the results for the cells of a batch.

        Without a batch, the cells are the clean run's.
        """
        plan, rows = self.plan, cells % self.plan.runs
        firsts = np.array([plan.conditions[condition].first for condition in cells // plan.runs])
        columns: dict[str, Any] = {"cell": cells}
        errors = np.full(len(cells), "", dtype=object)
        for name, read in plan.reads.items():
            steps = [read.at(int(first)).step for first in firsts]
            clean = [self.baselines[name, step] for step in steps]
            before = {
                column: np.array(
                    [one.values[column][row] for one, row in zip(clean, rows, strict=True)]
                )
                for column in clean[0].values
            }
            if batch is None:
                after = Measured(
                    before,
                    np.array(
                        [one.errors[row] for one, row in zip(clean, rows, strict=True)],
                        dtype=object,
                    ),
                )
            else:
                after = measured(
                    name,
                    plan.metrics[name],
                    found[read],
                    batch.clean_tensor(read),
                    batch.prompts,
                    self.batch,
                )
            for column, value in before.items():
                full = f"{name}_{column}" if column else name
                columns[full] = after.values.get(column, np.full(len(cells), np.nan))
                columns[f"{full}_baseline"] = value
            errors = np.array(
                ["; ".join(filter(None, pair)) for pair in zip(errors, after.errors, strict=True)],
                dtype=object,
            )
        return pd.DataFrame({**columns, "error": errors})


@runtime_checkable
class Workers(Protocol):
    """Whoever samples the runs of a plan: this process, or those of a cluster."""

    def sample(self, rows: Rows, reads: set[Read], batch: int) -> CleanRuns:
        """The runs of some rows without intervention."""
        ...

    def scores(
        self, question: Question, groups: Sequence[Rows]
    ) -> Iterable[tuple[Float[np.ndarray, "condition row"], CleanRuns]]:
        """The scores of each group of rows, and its runs (`scores.scores_of_rows`), in order."""
        ...

    def tables(
        self, work: SweepContext, clean: CleanRuns, jobs: Sequence[Sequence[Fork]]
    ) -> Iterable[pd.DataFrame]:
        """The rows of every job's cells, in the order in which they are ready."""
        ...


@dataclass
class Here:
    """This process."""

    plan: Plan
    advance: Callable[[int], None]
    """Told the rows of each denoising step."""

    def sample(self, rows: Rows, reads: set[Read], batch: int) -> CleanRuns:
        """As in `Workers`."""
        return CleanRuns.sample(
            self.plan.model, self.plan.inputs(), self.plan.noise, rows, reads, batch, self.advance
        )

    def scores(
        self, question: Question, groups: Sequence[Rows]
    ) -> Iterator[tuple[Float[np.ndarray, "condition row"], CleanRuns]]:
        """As in `Workers`."""
        inputs = self.plan.inputs()
        return (scores_of_rows(self.plan, inputs, question, rows) for rows in groups)

    def tables(
        self, work: SweepContext, clean: CleanRuns, jobs: Sequence[Sequence[Fork]]
    ) -> Iterable[pd.DataFrame]:
        """As in `Workers`."""
        return (work.rows(clean, forks, self.advance) for forks in jobs)


class WholeRuns(Here):
    """This process, for a model whose runs cannot be left at a step.

    Each cell is a whole generation, and metrics read images alone.
    """

    def sample(self, rows: Rows, reads: set[Read], batch: int) -> CleanRuns:
        """As in `Workers`, without a record."""
        plan, draft, no_latent = self.plan, self.plan.draft(), torch.empty(len(rows), 0)
        parts = [self._draw(draft, rows[i : i + batch], ()) for i in range(0, len(rows), batch)]
        found = dict.fromkeys(reads, torch.cat(parts))
        return CleanRuns(plan.model, draft, plan.noise, rows, Record(), no_latent, found)

    def tables(
        self, work: SweepContext, clean: CleanRuns, jobs: Sequence[Sequence[Fork]]
    ) -> Iterator[pd.DataFrame]:
        """As in `Workers`; a batch has one condition."""
        plan, reads = self.plan, set(self.plan.reads.values())
        forks = sorted((fork for job in jobs for fork in job), key=lambda fork: fork.condition)
        for number, group in groupby(forks, key=lambda fork: fork.condition):
            condition, own = plan.conditions[number], list(group)
            batches = [[f] for f in own] if condition.joint else plan.batches(own, work.batch)
            for some in batches:
                batch = ForkBatch(clean, plan.conditions, some)
                images = self._draw(clean.inputs, batch.rows, condition.edits)
                cells = np.concatenate([plan.cells_of(fork) for fork in some])
                yield work.table(cells, batch, dict.fromkeys(reads, images))

    def _draw(
        self, draft: Any, rows: Rows, edits: Sequence[Edit]
    ) -> Float[Tensor, "row 3 height width"]:
        model, prompts = self.plan.model, torch.from_numpy(rows % len(draft))
        own = [part for edit in edits if bool((part := edit.take(prompts)).where.any())]
        with model.hooks([(edit.site.name, edit) for edit in own]):
            images = model.draw(inputs_of(model, draft, self.plan.noise, rows))
        self.advance(len(rows) * self.plan.steps)
        return images


class Execution:
    """One run of a plan, for the cells that have no result yet.

    Args:
        known: runs without intervention that are there already, of any rows.
    """

    def __init__(
        self,
        plan: Plan,
        results: Results,
        done: Bool[np.ndarray, " cell"],
        known: CleanRuns | None = None,
    ) -> None:
        self.plan, self.results, self.done, self.known = plan, results, done, known
        self.pending = [fork for fork in plan.forks if not done[plan.cells_of(fork)].all()]
        forked = np.zeros(plan.cells, dtype=bool)
        for fork in plan.forks:
            forked[plan.cells_of(fork)] = True
        self.unchanged = np.flatnonzero(~forked & ~done)
        self.rows = np.unique(
            np.concatenate([self.unchanged % plan.runs, *(fork.rows for fork in self.pending)])
        )
        self.batch = _batch(plan, results)

    def run(self, cluster: Cluster | None = None) -> None:
        """Put every cell's row into the results, with the help of a cluster if there is one.

        Raises:
            ValueError: a metric fails on every run without intervention.
        """
        plan = self.plan
        batch = (
            self.batch
            if cluster is None
            else cluster.batch(sum(len(fork.rows) for fork in self.pending), self.batch)
        )
        jobs = list(plan.batches(self.pending, batch))
        steps = np.zeros(plan.cells, dtype=np.int64)
        for fork in self.pending:
            steps[plan.cells_of(fork)] = fork.until - fork.first
        work = len(self.rows) * plan.steps + int(steps.sum())
        away = cluster is not None and bool(jobs)
        with progress_bar(
            int((~self.done).sum()), work, disable=len(jobs) < PROGRESS_FROM
        ) as advance:
            workers: Workers = (
                cluster.team(len(jobs))
                if cluster is not None and jobs
                else (WholeRuns if plan.model.behind_nnsight else Here)(plan, advance.rows)
            )
            clean = self.clean(workers)
            clean.expect(self.pending)
            shared = SweepContext(plan, self.baselines(clean), self.batch)
            if away:
                advance.rows(len(self.rows) * plan.steps)
            if len(self.unchanged):
                self.results.add(shared.table(self.unchanged, None, {}))
                advance.cells(len(self.unchanged))
            for table in workers.tables(shared, clean, jobs):
                self.results.add(table)
                advance.cells(len(table))
                if away:
                    advance.rows(int(steps[table["cell"]].sum()))

    def clean(self, workers: Workers) -> CleanRuns:
        """The runs without intervention; those that are not known are sampled."""
        known = [] if self.known is None else [self.known]
        missing = np.setdiff1d(self.rows, [row for part in known for row in part.rows])
        if len(missing):
            known.insert(0, workers.sample(missing, self.plan.reads_at_steps, self.batch))
        merged = CleanRuns.merged(known)
        return merged.at(np.searchsorted(merged.rows, self.rows))

    def baselines(self, clean: CleanRuns) -> dict[tuple[str, int | None], Measured]:
        """As in `SweepContext`: a metric that cannot work is found out here.

        Raises ValueError if it fails on every run.
        """
        found = {}
        for name, read in self.plan.reads.items():
            for at in {read.at(condition.first) for condition in self.plan.conditions}:
                tensor, prompts = clean.found[at], self.rows % len(self.plan.prompts)
                values, errors = measured(
                    name, self.plan.metrics[name], tensor, tensor, prompts, self.batch
                )
                if all(errors):
                    raise ValueError(
                        f"The metric fails on every run without intervention. {errors[0]}"
                    )
                found[name, at.step] = Measured(
                    {column: self._spread(value, np.nan) for column, value in values.items()},
                    self._spread(errors, ""),
                )
        return found

    def _spread(self, values: np.ndarray, empty: Any) -> np.ndarray:
        whole = np.full(self.plan.runs, empty, dtype=values.dtype)
        whole[self.rows] = values
        return whole


def measured(
    name: str, metric: Metric, tensor: Tensor, baseline: Tensor, prompts: np.ndarray, batch: int
) -> Measured:
    """A metric, `batch` rows at a time; row by row where it fails, to keep the others' values."""
    parts = []
    for start in range(0, len(tensor), batch):
        some = slice(start, start + batch)
        size = len(prompts[some])
        try:
            parts.append(
                Measured(
                    metric(tensor[some], baseline[some], prompts[some]),
                    np.full(size, "", dtype=object),
                )
            )
        except Exception as error:
            if size > 1:
                parts.append(measured(name, metric, tensor[some], baseline[some], prompts[some], 1))
            else:
                parts.append(
                    Measured(
                        {}, np.array([f"{name}: {type(error).__name__}: {error}"], dtype=object)
                    )
                )
    columns = dict.fromkeys(column for part in parts for column in part.values)
    values = {
        column: np.concatenate(
            [part.values.get(column, np.full(len(part.errors), np.nan)) for part in parts]
        )
        for column in columns
    }
    return Measured(values, np.concatenate([part.errors for part in parts]))


def _batch(plan: Plan, results: Results) -> int:
    """The batch size: of a folder, the one that it was begun with."""
    if results.folder is None or plan.chosen_batch is not None:
        return plan.batch
    if "batch" not in results.store.facts:
        results.store.record(cells=plan.cells, forks=len(plan.forks), batch=plan.batch)
    return int(results.store.facts["batch"])


def metric_of(plan: Plan, column: str) -> str | None:
    """The metric that a column of the table belongs to."""
    return max(
        (name for name in plan.metrics if column == name or column.startswith(f"{name}_")),
        key=len,
        default=None,
    )


def depends_on_condition(plan: Plan, column: str) -> bool:
    """True if a column's baseline is taken at another step in another condition."""
    name = metric_of(plan, column)
    return name is not None and plan.reads[name].step == FIRST_TOUCHED
