"""Effect of an intervention on one tensor: an action and row-indexed tensors, as a hook function.

`dit_lens.intervene.interventions` describes the actions, and makes edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from hooked_models.arguments import number, shown
from hooked_models.generation.names import Site
from hooked_models.hooks.module import HookFunction
from hooked_models.lazy_imports import RenamedAttribute

from .portable_ops import edited


@dataclass(frozen=True, eq=False)
class Replace:
    """Replace the selected entries by a value.

    Args:
        value: a tensor, or tensors by hook name (full, or as within the denoiser, then for all
            steps and branches). A tensor has the activation's shape, with as many rows as prompts
            or one for all, or broadcasts to its last axes. A cache of other prompts makes this
            activation patching; its means over prompts, `{name: t.mean(0) for name, t in
            cache.items()}`, make it mean ablation with a reference.

    Example:
        >>> Intervention("blocks.1.hook_mlp_out", action=Replace(torch.zeros(192))).action
        Replace()
    """

    value: Tensor | Mapping[str, Tensor] | ActivationCache = field(repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.value, Tensor):
            _check_real("Replace", self.value)
        elif not hasattr(self.value, "keys"):
            raise ValueError(
                f"Replace({shown(self.value)}): give a tensor (torch.tensor(…)), or tensors by "
                "hook name."
            )


@dataclass(frozen=True)
class Scale:
    """Multiply the selected entries by a number.

    Example:
        >>> Intervention("blocks.1.cross_attn.hook_z", heads=[0], action=Scale(0.5)).action
        Scale(factor=0.5)
    """

    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number("factor", self.factor))


@dataclass(frozen=True, eq=False)
class Add:
    """Add a tensor to the selected entries, shaped as in `Replace`.

    Example:
        >>> Intervention("hook_caption", tokens="relation", action=Add(torch.ones(192))).action
        Add()
    """

    vector: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        _check_real("Add", self.vector)


def _check_real(action: str, value: Any) -> None:
    """Raise ValueError unless the value is a tensor of real, finite numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{action}({shown(value)}): give a tensor (torch.tensor(…)).")
    if value.is_complex() or value.dtype == torch.bool or not bool(value.isfinite().all()):
        kind = "of not finite numbers" if value.is_floating_point() else f"of {value.dtype}"
        raise ValueError(f"{action} of a tensor {kind}: give real, finite numbers.")


Action = Literal["zero", "mean", "resample", "knockout"] | Replace | Scale | Add


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Effect of an intervention on one tensor of a generation, for rows 0, 1, …: a hook function.

    All properties of a row are in row-indexed tensors, so that rows can be taken, in any order and
    repeatedly.
    """

    site: Site
    action: Action
    where: Bool[Tensor, "row ..."]
    """Mask of the entries that change; 1 along axes that are selected whole."""
    prompt: Int[Tensor, " row"]
    """Group ids: equal for equal prompts."""
    exchange_group: Int[Tensor, " row"]
    """Group ids: rows with equal ids may exchange values under "resample"."""
    ordered_axis: int | None = None
    """The token axis, if selected tokens correspond in order and not by position; else None."""
    seed: int = 0
    values: Tensor | None = None
    """Values of `Replace` and `Add`: one for each row if it has all axes, else one for all."""
    num_steps: int | None = None
    """Number of steps of the run, if the intervention's steps depend on it; else None."""
    alike = RenamedAttribute("exchange_group")

    # TransformerLens calls repr of every hook, and printing tensors takes longer than a step
    def __repr__(self) -> str:
        action = self.action if isinstance(self.action, str) else type(self.action).__name__
        return f"Edit({self.site.name}, {action}, {len(self.where)} rows)"

    def take(self, rows: Int[Tensor, " taken"]) -> Edit:
        """Edit for a batch made of these rows; "mean" and "resample" are then over these rows."""
        values = self.values
        if values is not None and values.ndim == self.where.ndim and len(values) == len(self.where):
            values = values[rows.to(values.device)]
        rows = rows.cpu()
        where, prompt, exchange_group = (
            self.where[rows.to(self.where.device)],
            self.prompt[rows],
            self.exchange_group[rows],
        )
        return replace(
            self, where=where, prompt=prompt, exchange_group=exchange_group, values=values
        )

    @property
    def depends_on_batch(self) -> bool:
        """True if the edit mixes rows of the batch."""
        return self.action in ("mean", "resample")

    @staticmethod
    def join(edits: Sequence[Edit]) -> Edit:
        """Concatenate the rows of several edits of one site.

        Their actions are equal and do not mix rows. Two `Replace` (or `Add`) are equal actions
        here, whatever their values.
        """
        first = edits[0]
        if len(edits) == 1:
            return first
        values = first.values
        if values is not None and not (
            values.ndim < first.where.ndim and all(edit.values is values for edit in edits)
        ):
            values = _stacked([_rows(edit) for edit in edits])
        prompt, exchange_group = (
            torch.cat([edit.prompt for edit in edits]),
            torch.cat([edit.exchange_group for edit in edits]),
        )
        return replace(
            first,
            where=_stacked([edit.where for edit in edits]),
            prompt=prompt,
            exchange_group=exchange_group,
            values=values,
        )

    def on(self, rows: Int[Tensor, " row"]) -> HookFunction:
        """Hook that applies this edit to the given rows of a larger batch alone."""
        return RowEdits(((self, rows),))

    def check(self) -> None:
        """Raise ValueError if the action is undefined for these rows on their own."""
        if self.action == "resample":
            _ = self.sources
        if self.action == "mean" and len(self.where) == 1 and self.ordered_axis is None:
            raise ValueError(
                "The mean over one prompt is that prompt: run several, or give a reference, "
                "Replace(mean)."
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless a tensor of this shape can be edited."""
        if shape[0] != len(self.where) or not _fits(self.where, shape):
            raise ValueError(
                f"{self.site.name} is {list(shape)}, but this edit was made for "
                f"{list(self.where.shape)} (1: any size): make the hooks for the prompts, in the "
                "order and number, that are run, and positions for the images' size."
            )
        if self.values is not None and not _fits(self.values, shape):
            raise ValueError(
                f"A value of shape {list(self.values.shape)} does not broadcast to "
                f"{self.site.name}, {list(shape)}."
            )

    @cached_property
    def sources(self) -> Int[Tensor, " row"]:
        """Source row of each row, of another prompt, for "resample".

        Raises:
            ValueError: too few prompts that can exchange values.
        """
        rng, source = np.random.default_rng(self.seed), np.arange(len(self.where))
        touched = self.where.flatten(1).any(dim=1).cpu().numpy()
        for kind in np.unique(self.exchange_group[touched]):
            rows = np.flatnonzero(touched & (self.exchange_group.numpy() == kind))
            source[rows] = rows[another_prompt(self.prompt[rows].numpy(), rng)]
        return torch.from_numpy(source)

    def __call__(
        self, tensor: Float[Tensor, "row ..."], hook: HookPoint | None = None
    ) -> Float[Tensor, "row ..."]:
        """Edited tensor. Raises ValueError for a shape other than the edit was made for."""
        self.check_shape(tensor.shape)
        return edited(tensor, **self.arguments)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `dit_lens.intervene.portable_ops.edited` for this edit."""
        kind = self.action if isinstance(self.action, str) else type(self.action).__name__.lower()
        found: dict[str, Any] = {
            "kind": kind,
            "where": self.where,
            "values": self.values,
            "ordered_axis": self.ordered_axis,
        }
        if isinstance(self.action, Scale):
            found["factor"] = self.action.factor
        if kind == "resample":
            found |= {
                "donors": (self.sources, None if self.ordered_axis is None else self._counterparts)
            }
        return found

    @cached_property
    def _counterparts(self) -> Int[Tensor, "row ..."]:
        """For each row's k-th selected token, the position of its source's k-th.

        Along the token axis, 1 elsewhere.
        """
        assert self.ordered_axis is not None
        selected = self.where.movedim(self.ordered_axis, 1).flatten(2).any(dim=2)
        # the selected positions first
        in_order = selected.long().argsort(dim=1, descending=True, stable=True)
        k = (selected.cumsum(dim=1) - 1).clamp(min=0)
        return along(
            in_order[self.sources.to(k.device)].gather(1, k), self.where.ndim, 0, self.ordered_axis
        )


@dataclass(frozen=True, repr=False)
class RowEdits:
    """Edits of one site, each in its own rows of a larger batch, in order, as one hook."""

    parts: Sequence[tuple[Edit, Int[Tensor, " _"]]]

    def __repr__(self) -> str:
        return f"RowEdits({', '.join(repr(edit) for edit, _ in self.parts)})"

    def __call__(
        self, tensor: Float[Tensor, "row ..."], hook: HookPoint | None = None
    ) -> Float[Tensor, "row ..."]:
        """Edited tensor. Rows without an edit keep their values exactly."""
        edited = tensor.clone()
        for edit, rows in self.parts:
            here = rows.to(tensor.device)
            edited.index_copy_(0, here, edit(edited[here], hook))
        return edited


def another_prompt(
    prompt: Int[np.ndarray, " row"], rng: np.random.Generator
) -> Int[np.ndarray, " row"]:
    """For each row, a row of another prompt; each row serves once.

    Rows are put in a random order, those of a prompt together, and shifted by the largest number of
    rows that share a prompt.

    Raises:
        ValueError: one prompt makes up more than half of the rows.
    """
    kinds, which, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    if 2 * counts.max() > len(prompt):
        raise ValueError(
            "A prompt finds no other one, with equally many selected tokens, to take its values "
            "from: resample in a larger batch "
            "of prompts whose wording is exchange_group, or use 'mean' or Replace(cache)."
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


def _rows(edit: Edit) -> Tensor:
    """An edit's values with all axes, a row each."""
    assert edit.values is not None
    n, ndim = len(edit.where), edit.where.ndim
    values = edit.values.reshape(*[1] * (ndim - edit.values.ndim), *edit.values.shape)
    return values.expand(n, *values.shape[1:])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of tensors that broadcast to each other along the other axes."""
    shape = torch.broadcast_shapes(*(part.shape[1:] for part in parts))
    return torch.cat([part.expand(-1, *shape) for part in parts])


def _fits(part: Tensor, shape: Sequence[int]) -> bool:
    return all(
        size in (1, whole) for size, whole in zip(part.shape[::-1], shape[::-1], strict=False)
    )
