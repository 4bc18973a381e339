"""The runs that a sweep's forks leave: sampled once for every prompt and seed, with all that forks begin with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.generation.names import Branch
from hooked_models.generation.sampling import SamplerState
from hooked_models.generation.trajectory import Inputs

from .metrics import Read

Rows = Int[np.ndarray, " row"]
"""Pairs of prompt and seed, numbered seed by seed: row = seed index · prompts + prompt."""


@dataclass(frozen=True)
class Fork:
    """What a treatment makes of some rows, which run together."""

    condition: int
    rows: Rows
    first: int
    """The step before which it is the clean run."""
    until: int
    """The step before which nobody looks any more."""
    starts: tuple[tuple[Branch, int], ...]
    """At the first step: branch → layer from which on it is not the clean run's."""


@dataclass
class Clean:
    """The runs of some rows without intervention: states before every step, network outputs, and what metrics read."""

    model: Any
    """As in a plan."""
    inputs: Inputs
    """Of the prompts, one row each."""
    seeds: Sequence[int]
    rows: Rows
    states: list[SamplerState]
    outs: list[dict[Branch, Float[Tensor, "row channel rows columns"]]]
    found: dict[Read, Tensor]
    layers: dict[tuple[int, Branch], list[int]] = field(default_factory=dict)
    """(step, branch) → the layers that forks begin at there."""
    residuals: dict[tuple[int, Branch], tuple[Rows, dict[int, Tensor]]] = field(default_factory=dict)
    """(step, branch) → what enters these layers, of some rows."""

    @classmethod
    def run(
        cls,
        model: HookedTextToImage,
        inputs: Inputs,
        seeds: Sequence[int],
        rows: Rows,
        reads: Collection[Read],
        batch: int,
        done: Callable[[int], None] = lambda rows: None,
    ) -> Clean:
        """Sample `rows`, `batch` at a time; `done` is told how many rows each denoising step had."""
        n, steps = len(inputs.tokens), inputs.sampler.num_steps
        chain: list[list[SamplerState]] = [[] for _ in range(steps + 1)]
        outs: list[dict[Branch, list[Tensor]]] = [{branch: [] for branch in branches_of(inputs)} for _ in range(steps)]
        found: dict[Read, list[Tensor]] = {read: [] for read in reads}
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            here = inputs.take(index_of(some % n, model))
            noise = model._noise([seeds[row // n] for row in some.tolist()], len(some))
            state = inputs.sampler.start(noise.to(model.device, model.dit.dtype))
            chain[0].append(state)
            for step in range(steps):
                kept: dict[str, Tensor] = {}
                wanted = {f"hook_out_{branch}" for branch in outs[step]}
                wanted |= {hook for read in reads if read.step == step for hook in read.hooks}
                with reading(model, step, wanted, kept):
                    state = model._step(here, state)
                chain[step + 1].append(state)
                for branch, parts in outs[step].items():
                    parts.append(kept[f"hook_out_{branch}"])
                for read in reads:
                    if read.step == step:
                        found[read].append(made_of(kept, read, inputs))
                done(len(some))
            for read in reads:
                if read.step is None:
                    found[read].append(state.latent if read.inner == "latent" else model.decode(state.latent))
        return cls(
            model,
            inputs,
            seeds,
            rows,
            [SamplerState.join(parts) for parts in chain],
            [{branch: torch.cat(parts) for branch, parts in at.items()} for at in outs],
            {read: torch.cat(parts) for read, parts in found.items()},
        )

    def expect(self, forks: Sequence[Fork]) -> None:
        """Say which forks there will be, so that what they begin with is computed for all of them at once."""
        wanted: dict[tuple[int, Branch], set[int]] = {}
        for fork in forks:
            for branch, layer in fork.starts:
                if layer > 0:
                    wanted.setdefault((fork.first, branch), set()).add(layer)
        self.layers = {key: sorted(layers) for key, layers in wanted.items()}

    def index(self, rows: Rows) -> Int[Tensor, " row"]:
        """Where rows stand here."""
        return index_of(np.searchsorted(self.rows, rows), self.model)

    def prepare(self, forks: Sequence[Fork]) -> None:
        """Have the residual streams ready that these forks begin with, and no others."""
        needed: dict[tuple[int, Branch], set[int]] = {}
        for fork in forks:
            for branch, layer in fork.starts:
                if layer > 0:
                    needed.setdefault((fork.first, branch), set()).update(fork.rows.tolist())
        kept = {}
        for key, wanted in needed.items():
            rows = np.array(sorted(wanted))
            have, tensors = self.residuals.get(key, (rows[:0], {}))
            missing = np.setdiff1d(rows, have)
            if len(missing):
                new = self._residuals(*key, missing)
                still = np.flatnonzero(np.isin(have, rows))
                old = {layer: tensor[index_of(still, self.model)] for layer, tensor in tensors.items()}
                joined = np.concatenate([have[still], missing])
                order = np.argsort(joined)
                at = index_of(order, self.model)
                tensors = {layer: (torch.cat([old[layer], x]) if old else x)[at] for layer, x in new.items()}
                have = joined[order]
            kept[key] = (have, tensors)
        self.residuals = kept

    def residual(self, step: int, branch: Branch, layer: int, rows: Rows) -> Float[Tensor, "row pos d_model"]:
        """What enters a layer, for rows that `prepare` was told of."""
        have, tensors = self.residuals[step, branch]
        return tensors[layer][index_of(np.searchsorted(have, rows), self.model)]

    def _residuals(self, step: int, branch: Branch, rows: Rows) -> dict[int, Tensor]:
        model, sampler, n = self.model, self.inputs.sampler, len(self.inputs.tokens)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint, layer: int) -> None:
            kept[layer] = tensor

        last = model.cfg.n_layers
        names = {layer: f"blocks.{layer}.hook_resid_pre" for layer in self.layers[step, branch] if layer < last}
        if last in self.layers[step, branch]:
            names[last] = f"blocks.{last - 1}.hook_resid_post"
        state = self.states[step].take(self.index(rows))
        some = self.inputs.take(index_of(rows % n, model))
        text = some.text.take(torch.arange(len(some.text.text), device=model.device)[some.rows(branch)])
        x = sampler.network_input(state, state.latent)
        timestep = sampler.timestep(step).expand(len(x)).to(x.device)
        with model.dit.hooks([(name, partial(keep, layer=layer)) for layer, name in names.items()]):
            model._denoise(x, timestep, model._sizes(state.latent, len(x)), text)
        return kept


def made_of(kept: dict[str, Tensor], read: Read, inputs: Inputs) -> Tensor:
    """A tensor that metrics read, from those that pass the hooks between calls; `eps` as `GenerationCache` derives it."""
    if read.inner != "eps":
        return kept[read.inner]
    assert read.step is not None
    alpha, sigma = inputs.sampler.noise_level(read.step)
    return (kept["hook_latent"] - alpha * kept["hook_x0"]) / sigma


@contextmanager
def reading(model: HookedTextToImage, step: int, inners: Collection[str], kept: dict[str, Tensor]) -> Iterator[None]:
    def keep(tensor: Tensor, hook: HookPoint, inner: str) -> None:
        kept[inner] = tensor.clone()

    with model.hooks([(f"steps.{step}.{inner}", partial(keep, inner=inner)) for inner in inners]):
        yield


def branches_of(inputs: Inputs) -> tuple[Branch, ...]:
    """In the order of the denoiser's rows."""
    return ("uncond", "cond") if inputs.guided else ("cond",)


def index_of(values: np.ndarray, model: HookedTextToImage) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(model.device)
