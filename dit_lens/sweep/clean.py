"""The runs that a sweep's forks leave.

Sampled once for every prompt and seed, with everything that forks begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage, Trajectory
from hooked_models.generation.loops import RunInputs
from hooked_models.generation.names import Branch
from hooked_models.generation.sampling import Solver
from hooked_models.generation.trajectory import Record
from hooked_models.hooks.module import HookFunction

from .metrics import Read

Rows = Int[np.ndarray, " _row"]
"""Pairs of prompt and seed, numbered seed by seed: row = seed index · prompts + prompt."""


@dataclass(frozen=True)
class Fork:
    """One re-run: the rows of a condition, and where it departs from the clean run.

    The rows run together.
    """

    condition: int
    rows: Rows
    first: int
    """The step before which it is the clean run."""
    until: int
    """First step that no metric needs."""
    starts: tuple[tuple[Branch, int], ...]
    """At the first step: branch → layer from which on it is not the clean run's."""


@dataclass
class CleanRuns:
    """The runs of some rows without intervention, and the tensors in them that metrics read."""

    model: Any
    """As in a plan."""
    inputs: Any
    """Text states of the prompts, one row each (`RunInputs`); None while it is sent elsewhere."""
    noise: Sequence[int]
    """The seed of each row."""
    rows: Rows
    record: Record
    latent: Float[Tensor, "row ..."]
    """After the last step."""
    found: dict[Read, Tensor]
    layers: dict[tuple[int, Branch], list[int]] = field(default_factory=dict)
    """(step, branch) → the layers that forks begin at there."""
    residuals: dict[tuple[int, Branch], tuple[Rows, dict[int, Tensor]]] = field(
        default_factory=dict
    )
    """(step, branch) → the residual streams that enter these layers, of some rows."""

    @property
    def steps(self) -> int:
        """Number of steps of each run."""
        return len(self.record)

    def on(self, model: Any, inputs: Any) -> CleanRuns:
        """The same with another model, which has to be an equal one, and its inputs.

        None for both, to send it elsewhere without.
        """
        return replace(self, model=model, inputs=inputs)

    def alone(self, row: int) -> CleanRuns:
        """The run of one row, without the model and the inputs."""
        return self.on(None, None).at(np.searchsorted(self.rows, [row]))

    def at(self, places: Int[np.ndarray, " row"]) -> CleanRuns:
        """The same with the runs at some places alone."""
        index = torch.from_numpy(places).to(self.latent.device)
        return replace(
            self,
            rows=self.rows[places],
            record=self.record.take(index),
            latent=self.latent[index],
            found={read: tensor[index] for read, tensor in self.found.items()},
        )

    @staticmethod
    def merged(parts: Sequence[CleanRuns]) -> CleanRuns:
        """Join samples of any rows, each row once and in ascending order, before any fork."""
        joined = replace(CleanRuns.join(parts), layers={}, residuals={})
        return joined.at(np.unique(joined.rows, return_index=True)[1])

    @staticmethod
    def join(parts: Sequence[CleanRuns]) -> CleanRuns:
        """Join samples of rows that follow each other; all else is the first part's."""
        return replace(
            parts[0],
            rows=np.concatenate([part.rows for part in parts]),
            record=Record.join([part.record for part in parts]),
            latent=torch.cat([part.latent for part in parts]),
            found={
                read: torch.cat([part.found[read] for part in parts]) for read in parts[0].found
            },
        )

    def take(self, rows: Rows, until: int | None = None) -> Trajectory:
        """The runs of some rows, in the order given.

        Their records up to a step, if one is given.
        """
        at = self.index(rows)
        inputs = inputs_of(self.model, self.inputs, self.noise, rows)
        return Trajectory(self.model, inputs, self.record.take(at, until), self.latent[at])

    @classmethod
    def sample(
        cls,
        model: HookedTextToImage,
        inputs: RunInputs,
        noise: Sequence[int],
        rows: Rows,
        reads: Collection[Read],
        batch: int,
        done: Callable[[int], None] = lambda rows: None,
    ) -> CleanRuns:
        """Sample `rows`, `batch` at a time, from `inputs` of the prompts, one row each.

        Args:
            model: the model that draws.
            inputs: prompts' inputs, one row a prompt; `noise` gives each run its own.
            noise: seed of each run's noise.
            rows: runs to sample: positions in prompts and noise.
            reads: tensors to keep for metrics and interventions.
            batch: rows at a time.
            done: called with the number of rows after each denoising step.
        """
        runs: list[Trajectory] = []
        clean = not (model.attached or model.has_hooks_inside)  # hooks below only read
        found: dict[Read, list[Tensor]] = {read: [] for read in reads}
        hooks = sorted(
            {(read.step, hook) for read in reads if read.step is not None for hook in read.hooks}
        )
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            kept: dict[tuple[int, str], Tensor] = {}
            with model.hooks(capturing(hooks, kept)):
                run = model.run(
                    inputs_of(model, inputs, noise, some),
                    after=lambda step, record, latent: done(len(latent)),
                )
            for read, parts in found.items():
                if read.step is None:
                    parts.append(run.latent if read.inner == "latent" else run.images)
                else:
                    parts.append(metric_input(kept, read, inputs.solver))
            runs.append(run)
        return cls(
            model,
            inputs,
            noise,
            rows,
            replace(Record.join([run.record for run in runs]), clean=clean),
            torch.cat([run.latent for run in runs]),
            {read: torch.cat(parts) for read, parts in found.items()},
        )

    def expect(self, forks: Sequence[Fork]) -> None:
        """Announce the forks, to compute their starting points all at once."""
        layers: dict[tuple[int, Branch], set[int]] = {}
        for fork in forks:
            for branch, layer in fork.starts:
                if layer > 0:
                    layers.setdefault((fork.first, branch), set()).add(layer)
        self.layers = {key: sorted(some) for key, some in layers.items()}

    def index(self, rows: Rows) -> Int[Tensor, " row"]:
        """Where rows stand here."""
        return as_index(np.searchsorted(self.rows, rows), self.model)

    def prepare(self, forks: Sequence[Fork]) -> None:
        """Have the residual streams ready that these forks begin with, and no others."""
        needed: dict[tuple[int, Branch], set[int]] = {}
        for fork in forks:
            for branch, layer in fork.starts:
                if layer > 0:
                    needed.setdefault((fork.first, branch), set()).update(fork.rows.tolist())
        kept = {}
        for key, numbers in needed.items():
            rows = np.array(sorted(numbers))
            have, tensors = self.residuals.get(key, (rows[:0], {}))
            missing = np.setdiff1d(rows, have)
            if len(missing):
                new = self._residuals(*key, missing)
                still = np.flatnonzero(np.isin(have, rows))
                old = {
                    layer: tensor[as_index(still, self.model)] for layer, tensor in tensors.items()
                }
                joined = np.concatenate([have[still], missing])
                order = np.argsort(joined)
                at = as_index(order, self.model)
                tensors = {
                    layer: (torch.cat([old[layer], x]) if old else x)[at]
                    for layer, x in new.items()
                }
                have = joined[order]
            kept[key] = (have, tensors)
        self.residuals = kept

    def residual(
        self, step: int, branch: Branch, layer: int, rows: Rows
    ) -> Float[Tensor, "row pos d_model"]:
        """Residual stream that enters a layer, for rows given to `prepare`."""
        have, tensors = self.residuals[step, branch]
        return tensors[layer][as_index(np.searchsorted(have, rows), self.model)]

    def _residuals(self, step: int, branch: Branch, rows: Rows) -> dict[int, Tensor]:
        model, run = self.model, self.take(rows)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint, layer: int) -> None:
            kept[layer] = tensor

        last = model.cfg.n_layers
        names = {
            layer: f"blocks.{layer}.hook_resid_pre"
            for layer in self.layers[step, branch]
            if layer < last
        }
        if last in self.layers[step, branch]:
            names[last] = f"blocks.{last - 1}.hook_resid_post"
        inputs: Any = run.inputs
        some = inputs.rows(branch)
        text = inputs.text.take(torch.arange(some.start, some.stop, device=model.device))
        x = inputs.solver.scaled(step, run.record.latents[step])
        timestep = inputs.solver.timestep(step).expand(len(x)).to(x.device)
        with model.dit.hooks([(name, partial(keep, layer=layer)) for layer, name in names.items()]):
            model.denoise(x, timestep, text)
        return kept


def inputs_of(model: HookedTextToImage, inputs: RunInputs, noise: Sequence[int], rows: Rows) -> Any:
    """The inputs of rows, each with the noise of its seed, from those of the prompts."""
    some = inputs.take(as_index(rows % len(inputs), model))
    return model.reseeded(some, [noise[row] for row in rows.tolist()])


def metric_input(kept: Mapping[tuple[int, str], Tensor], read: Read, solver: Solver) -> Tensor:
    """A tensor that metrics read, from those at hooks between calls.

    `eps` as `GenerationCache` derives it.
    """
    assert read.step is not None
    if read.inner != "eps":
        return kept[read.step, read.inner]
    alpha, sigma = solver.noise_levels[read.step]
    return (kept[read.step, "hook_latent"] - alpha * kept[read.step, "hook_x0"]) / sigma


def capturing(
    hooks: Iterable[tuple[int, str]], kept: dict[tuple[int, str], Tensor]
) -> list[tuple[str, HookFunction]]:
    """Hooks that copy tensors between calls into `kept`, under (step, name)."""

    def keep(tensor: Tensor, hook: HookPoint, key: tuple[int, str]) -> None:
        kept[key] = tensor.clone()

    return [(f"steps.{step}.{inner}", partial(keep, key=(step, inner))) for step, inner in hooks]


def as_index(values: np.ndarray, model: HookedTextToImage) -> Tensor:
    """Indices as a tensor where the model is."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(model.device)
