"""What an intervention does to one tensor: an action and row-indexed tensors, as a hook function.

`dit_lens.interventions` says what the actions mean, and makes edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from hooked_models.hooked_module import HookFunction
from hooked_models.names import Site

MASKED = -10000.0
"""The score of a masked key: what PixArt adds for a pad. Finite, so that no row can become NaN."""


@dataclass(frozen=True, eq=False)
class Replace:
    """Put a value there: a tensor, or tensors by hook name (full, or as within the denoiser, then for all steps and branches).

    A tensor has the activation's shape, with as many rows as prompts or one for all, or broadcasts to its last axes. A cache of
    other prompts makes this activation patching; its means over prompts, `{name: t.mean(0) for name, t in cache.items()}`,
    make it mean ablation with a reference.
    """

    value: Tensor | Mapping[str, Tensor] | ActivationCache = field(repr=False)


@dataclass(frozen=True)
class Scale:
    """Multiply by a number."""

    factor: float


@dataclass(frozen=True, eq=False)
class Add:
    """Add a tensor, shaped as in `Replace`."""

    vector: Tensor = field(repr=False)


Action = Literal["zero", "mean", "resample", "knockout"] | Replace | Scale | Add


@dataclass(frozen=True, eq=False)
class Edit:
    """What an intervention does to one tensor of a generation, for rows 0, 1, …: a hook function.

    Everything a row needs stands in row-indexed tensors, so that rows can be taken, in any order and repeatedly.
    """

    site: Site
    action: Action
    where: Bool[Tensor, "row ..."]
    """The entries that change; as many axes as the tensor, 1 along those that are taken whole."""
    prompt: Int[Tensor, " row"]
    """Equal numbers for equal prompts."""
    alike: Int[Tensor, " row"]
    """Rows of equal numbers can lend each other what is selected ("resample")."""
    pooled: int | None = None
    """The token axis, where selected tokens correspond in order, and not by position."""
    seed: int = 0
    values: Tensor | None = None
    """Of `Replace` and `Add`: one row each if it has all axes and as many rows, else the same for all."""

    def take(self, rows: Int[Tensor, " taken"]) -> Edit:
        """The same edit for a batch made of these rows; "mean" and "resample" then look at these rows."""
        values = self.values
        if values is not None and values.ndim == self.where.ndim and len(values) == len(self.where):
            values = values[rows.to(values.device)]
        rows = rows.cpu()
        where, prompt, alike = self.where[rows.to(self.where.device)], self.prompt[rows], self.alike[rows]
        return replace(self, where=where, prompt=prompt, alike=alike, values=values)

    def on(self, rows: Int[Tensor, " row"]) -> HookFunction:
        """A hook that makes this edit in the given rows of a larger batch, and leaves the others as they are."""

        def hook_function(tensor: Tensor, hook: HookPoint | None = None) -> Tensor:
            here = rows.to(tensor.device)
            return tensor.index_copy(0, here, self(tensor[here], hook))

        return hook_function

    def check(self) -> None:
        """Raise ValueError for an action that these rows, on their own, give no meaning to."""
        if self.action == "resample":
            _ = self.sources
        if self.action == "mean" and len(self.where) == 1 and self.pooled is None:
            raise ValueError("The mean over one prompt is that prompt: run several, or give a reference, Replace(mean).")

    @cached_property
    def sources(self) -> Int[Tensor, " row"]:
        """For "resample": the row, of another prompt, that each row takes its values from.

        Raises:
            ValueError: too few prompts that are alike.
        """
        rng, source = np.random.default_rng(self.seed), np.arange(len(self.where))
        touched = self.where.flatten(1).any(dim=1).cpu().numpy()
        for kind in np.unique(self.alike[touched]):
            rows = np.flatnonzero(touched & (self.alike.numpy() == kind))
            source[rows] = rows[another_prompt(self.prompt[rows].numpy(), rng)]
        return torch.from_numpy(source)

    def __call__(self, tensor: Float[Tensor, "row ..."], hook: HookPoint | None = None) -> Float[Tensor, "row ..."]:
        """The tensor as it goes on. Raises ValueError for a tensor of another shape than the edit was made for."""
        if len(tensor) != len(self.where) or not _fits(self.where, tensor):
            raise ValueError(
                f"{self.site.name} is {list(tensor.shape)}, but this edit was made for {list(self.where.shape)} (1: any size): "
                "make the hooks for the prompts, in the order and number, that are run, and positions for the images' size."
            )
        if self.values is not None and not _fits(self.values, tensor):
            raise ValueError(
                f"A value of shape {list(self.values.shape)} does not broadcast to {self.site.name}, {list(tensor.shape)}."
            )
        return torch.where(self.where, self._changed(tensor), tensor)

    def _changed(self, tensor: Tensor) -> Tensor:
        match self.action:
            case "zero":
                return torch.zeros_like(tensor)
            case "knockout":
                return torch.full_like(tensor, MASKED)
            case "mean":
                if self.pooled is None:
                    return tensor.mean(dim=0, keepdim=True)
                over = (0, self.pooled)
                return (tensor * self.where).sum(over, keepdim=True) / self.where.sum(over, keepdim=True).clamp(min=1)
            case "resample":
                source = tensor[self.sources.to(tensor.device)]
                return source if self.pooled is None else source.take_along_dim(self._counterparts, self.pooled)
            case Scale(factor):
                return factor * tensor
            case Replace():
                return self._value_like(tensor)
            case Add():
                return tensor + self._value_like(tensor)

    def _value_like(self, tensor: Tensor) -> Tensor:
        assert self.values is not None
        return self.values.to(tensor)

    @cached_property
    def _counterparts(self) -> Int[Tensor, "row ..."]:
        """For each row's k-th selected token, the position of its source's k-th; along the token axis, 1 elsewhere."""
        assert self.pooled is not None
        selected = self.where.movedim(self.pooled, 1).flatten(2).any(dim=2)
        in_order = selected.long().argsort(dim=1, descending=True, stable=True)  # the selected positions first
        k = (selected.cumsum(dim=1) - 1).clamp(min=0)
        return along(in_order[self.sources.to(k.device)].gather(1, k), self.where.ndim, 0, self.pooled)


def another_prompt(prompt: Int[np.ndarray, " row"], rng: np.random.Generator) -> Int[np.ndarray, " row"]:
    """For each row, a row of another prompt; each row serves once.

    Rows are put in a random order, those of a prompt together, and shifted by the largest number of rows that share a prompt.

    Raises:
        ValueError: one prompt makes up more than half of the rows.
    """
    kinds, which, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    if 2 * counts.max() > len(prompt):
        raise ValueError(
            "A prompt finds no other one, with equally many selected tokens, to take its values from: resample in a larger batch "
            "of prompts whose wording is alike, or use 'mean' or Replace(cache)."
        )
    order = np.argsort(rng.permutation(len(kinds))[which], kind="stable")
    source = np.empty_like(order)
    source[order] = np.roll(order, -counts.max())
    return source


def along(values: Tensor, ndim: int, *axes: int | None) -> Tensor:
    """`values` with its axes placed at `axes` of a tensor of `ndim` axes, 1 elsewhere."""
    shape = [1] * ndim
    for axis, size in zip(axes, values.shape, strict=True):
        assert axis is not None
        shape[axis] = size
    return values.reshape(shape)


def _fits(part: Tensor, tensor: Tensor) -> bool:
    return all(size in (1, whole) for size, whole in zip(part.shape[::-1], tensor.shape[::-1], strict=False))
