"""A sweep before it runs: its cells, the work they share, the cost; and then the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int

from hooked_models.generation.attached import Extent
from hooked_models.generation.names import IMAGE_HOOK
from hooked_models.lazy_imports import RenamedAttribute

from ..store import digest, fingerprint
from .clean import Fork
from .cluster import Cluster
from .conditions import Condition
from .cost import Cost, batch_size, cost_of
from .execute import Execution, depends_on_condition
from .metrics import Metric, Read
from .results import Results, dataset


@dataclass(frozen=True, repr=False)
class Plan:
    """A sweep that is ready to run; made by `sweep.plan`.

    Example:
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> plan, plan.cells
        (Plan(3 interventions, 1 prompts, 1 seeds: explain()), 3)
    """

    model: Any
    """A HookedTextToImage; None while a plan travels to a worker that has its own."""
    prompts: Sequence[str]
    seeds: Sequence[int | Sequence[int]]
    """One for all prompts, or several: one a prompt."""
    conditions: Sequence[Condition]
    metrics: Mapping[str, Metric]
    reads: Mapping[str, Read]
    """Metric → the tensor it reads."""
    num_steps: int
    """As requested of the scheduler."""
    steps: int
    """Steps of a run: evaluations of the denoiser."""
    guidance: float
    extent: Extent
    """Tensors that a run computes."""
    rng: int
    chosen_batch: int | None = None
    treatments = RenamedAttribute("conditions")

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.conditions)} interventions, {len(self.prompts)} prompts, "
            f"{len(self.seeds)} seeds: explain())"
        )

    @property
    def runs(self) -> int:
        """Pairs of prompt and seed."""
        return len(self.prompts) * len(self.seeds)

    @cached_property
    def noise(self) -> list[int]:
        """The seed of each row."""
        n = len(self.prompts)
        every = [[one] * n if isinstance(one, int) else one for one in self.seeds]
        return [seed for several in every for seed in several]

    @property
    def reads_at_steps(self) -> set[Read]:
        """Tensors that metrics read, with their steps."""
        firsts = {condition.first for condition in self.conditions}
        return {read.at(first) for read in self.reads.values() for first in firsts}

    @property
    def cells(self) -> int:
        """Number of cells: one for each condition, prompt and seed."""
        return len(self.conditions) * self.runs

    @cached_property
    def forks(self) -> list[Fork]:
        """Runs to make, neighbours sharing most; other cells equal those of the clean run."""
        found: list[Fork] = []
        for number, condition in enumerate(self.conditions):
            if (until := self.until(condition)) is not None:
                found += self.forks_of(number, condition.first, until, range(len(self.seeds)))

        def place(fork: Fork) -> tuple[int, ...]:
            row, layer = (
                int(fork.rows[0]),
                min(dict(fork.starts).values(), default=self.model.cfg.n_layers),
            )
            return (fork.first, row // len(self.prompts), len(fork.rows), row, layer)

        return sorted(found, key=place)

    def forks_of(self, number: int, first: int, until: int, seeds: Iterable[int]) -> Iterator[Fork]:
        """Forks of one condition, clean up to step `first`.

        One a prompt, unless prompts depend on each other.
        """
        n, condition = len(self.prompts), self.conditions[number]
        branches = tuple(
            (branch, layer if self.model.enters_at_layers else 0)
            for branch, layer in condition.starts(self.model.cfg.n_layers, first).items()
            if branch == "cond" or first in self.extent.uncond
        )
        groups = [np.arange(n)] if condition.joint else np.flatnonzero(condition.prompts)[:, None]
        for seed in seeds:
            for group in groups:
                yield Fork(number, seed * n + group, first, until, branches)

    def until(self, condition: Condition) -> int | None:
        """First step that no metric needs; None if no metric depends on the condition."""
        seen = []
        for read in self.reads.values():
            if read.inner == IMAGE_HOOK or (
                read.inner == "latent" and condition.first < self.steps
            ):
                seen.append(self.steps)
            elif (
                step := read.at(condition.first).step
            ) is not None and condition.first <= step < self.steps:
                seen.append(step + 1)
        return max(seen, default=None)

    def cells_of(self, fork: Fork) -> Int[np.ndarray, " row"]:
        """The numbers of a fork's cells, row by row."""
        return fork.condition * self.runs + fork.rows

    @cached_property
    def batch(self) -> int:
        """Rows that run together: by default as many as fit into half of the free memory."""
        return batch_size(self) if self.chosen_batch is None else self.chosen_batch

    def batches(self, forks: Sequence[Fork], batch: int) -> Iterator[list[Fork]]:
        """Forks in order, as many at a time as have `batch` rows; one that has more runs alone."""
        some: list[Fork] = []
        rows = 0
        for fork in forks:
            if some and rows + len(fork.rows) > batch:
                yield some
                some, rows = [], 0
            some.append(fork)
            rows += len(fork.rows)
        if some:
            yield some

    @cached_property
    def cost(self) -> Cost:
        """Expected cost; measured on a few denoiser calls of random latents, in a second or so."""
        return cost_of(self)

    def explain(self) -> str:
        """Cells, shared work, FLOPs, bytes and expected time, in words, before anything runs."""
        return str(self.cost)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By which a folder of results is known."""
        return {
            "model": self.model.digest(),
            "prompts": digest(*self.prompts, *self._encoding),
            "seeds": digest(str(list(self.seeds))),
            "interventions": digest(*(condition.digest for condition in self.conditions)),
            "metrics": fingerprint(self.metrics),
            "num_steps": self.num_steps,
            "guidance": self.guidance,
        }

    @property
    def _encoding(self) -> list[str]:
        """Hash of the encoded prompts, where the encoder is not on another machine."""
        return [] if self.model.behind_nnsight else [self.inputs().settings["text"]]

    def draft(self) -> Any:
        """Inputs of a run of the prompts, one row each, whose text may not be encoded yet."""
        return self.model.draft(self.prompts, 0, self.num_steps, self.guidance)

    @torch.no_grad()
    def inputs(self) -> Any:
        """Inputs of a run of the prompts, one row each."""
        return self.model.prepare(self.prompts, 0, self.num_steps, self.guidance)

    @torch.no_grad()
    def run(
        self, out: str | Path | None = None, executor: str = "local", workers: int | None = None
    ) -> xr.Dataset:
        """As `sweep.run`."""
        with cluster_of(self, executor, workers) as cluster:
            return self.run_by(cluster, out)

    def run_by(self, cluster: Cluster | None, out: str | Path | None) -> xr.Dataset:
        """As `run`, on the workers of a cluster of this plan, or of one that this is part of."""
        folder = None if out is None else Path(out)
        results = Results(folder, {} if folder is None else self.settings)
        try:
            done = np.zeros(self.cells, dtype=bool)
            done[results.done] = True
            if not done.all():
                Execution(self, results, done).run(cluster)
        finally:
            results.close()
        own = {column: depends_on_condition(self, column) for column in results.table.columns}
        attrs = {"num_steps": self.num_steps, "guidance": self.guidance}
        return dataset(results.table, self.conditions, self.prompts, self.seeds, own, attrs)


def cluster_of(
    plan: Plan, executor: str = "local", workers: int | None = None
) -> AbstractContextManager[Cluster | None]:
    """The cluster of an executor; None for "local".

    Raises:
        ValueError: there is no such executor, "local" is given a number of workers, or "ray" a
            model behind nnsight.
    """
    if executor == "ray" and plan.model.behind_nnsight:
        raise ValueError("A model behind nnsight draws where it is: choose executor='local'.")
    if executor == "ray":
        return Cluster(plan, workers)
    if executor != "local":
        raise ValueError(
            f"executor={executor!r} does not exist: choose 'local' (this process) or 'ray' (a Ray "
            "cluster)."
        )
    if workers is not None:
        raise ValueError(
            f"workers={workers} are those of a Ray cluster: choose executor='ray', or leave "
            "workers out."
        )
    return nullcontext()
