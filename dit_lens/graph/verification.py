"""Scores of a model's parts, and their accuracy: exact patches of the largest and of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.patching import PatchingResult

from hooked_models.lazy_imports import renamed

from ..runs.gradients import Metric, checked_metric
from ..runs.pairs import Context, Pair
from ..stats import Interval, rank_correlation

__getattr__ = renamed(
    __name__,
    {
        "Edit": "dit_lens.graph.verification:Patch",
    },
)


@dataclass(frozen=True)
class Verification:
    """Exact patches, one cell at a time, beside the scores that predicted them.

    Example:
        >>> found = attribution.nodes(attribution.pair(below, above, steps=0), red, ["cross_attn"])
        >>> found.verify(k=2, sample=3).table["drawn"].tolist()
        ['top', 'top', 'sample', 'sample', 'sample']
    """

    result: PatchingResult
    """One row a cell: first the top k, then the random sample (`index_df["drawn"]` says which).

    Metric values per prompt, with TransformerLens' effects, intervals and p-values; `effect()` is
    the quantity that the scores estimate.
    """
    spearman: Interval
    """Rank correlation of scores and exact effects (means over prompts) over the random sample."""
    p: float

    @property
    def table(self) -> pd.DataFrame:
        """One row a cell: its place, `score` and `exact` effect, both means over prompts."""
        return self.result.index_df.assign(exact=self.result.effect().mean(-1).cpu().numpy())


class Patch(NamedTuple):
    """Adds (source − original) at `sender[sender_part]` to `receiver[receiver_part]`."""

    receiver: str
    receiver_part: tuple[Any, ...]
    sender: str
    sender_part: tuple[Any, ...]
    minus: str | None = None
    """Hook whose own difference is taken from the sender's."""
    undo: str | None = None
    """Hook at which the addition is taken away again."""


@dataclass(frozen=True)
class Attribution:
    """Scores of nodes or edges, with the runs and the metric that they are of."""

    scores: Any
    """Dims (step, branch, prompt, …); a denoiser call has no step and branch."""
    pair: Pair
    metric: Metric

    def table(self) -> pd.DataFrame:
        """One row a cell, the largest mean over prompts (`score`, in magnitude) first."""
        raise NotImplementedError

    def _patch(self, row: Any) -> Patch:
        """The patch that a cell stands for."""
        raise NotImplementedError

    def verify(self, k: int = 10, sample: int = 30, seed: int = 0) -> Verification:
        """Patch the `k` largest cells and a random `sample` of all, each exactly and alone.

        The original is run again for each. Costs k + sample runs from the cell's step on.
        """
        table = self.table()
        drawn = np.sort(np.random.default_rng(seed).permutation(len(table))[:sample])
        cells = pd.concat(
            [table.head(k).assign(drawn="top"), table.iloc[drawn].assign(drawn="sample")],
            ignore_index=True,
        )
        values = self._patched(cells)
        baseline = checked_metric(self.metric, self.pair.original.output)
        result = PatchingResult(values, [], cells, ["metric"], reduced=False, baseline=baseline)
        exact = result.effect().mean(-1)[min(k, len(table)) :].double().cpu().numpy()
        return Verification(
            result, *rank_correlation(cells["score"].to_numpy()[min(k, len(table)) :], exact)
        )

    def _patched(self, cells: pd.DataFrame) -> Float[Tensor, "cell batch"]:
        """The metric of the original run under each cell's patch."""
        values: dict[int, Tensor] = {}
        patches = [self._patch(row) for row in cells.itertuples()]
        contexts = [self._context(row) for row in cells.itertuples()]
        with self._flags():
            for context in self.pair.contexts:
                here = [i for i, other in enumerate(contexts) if other is context]
                names = [(patches[i].sender, patches[i].minus) for i in here]
                read = [context.prefix + name for pair in names for name in pair if name]
                differences = (
                    self.pair.differences(context.step, list(dict.fromkeys(read))) if read else {}
                )
                for i in here:
                    hooks = _hooks(patches[i], context.prefix, differences)
                    run = self.pair.original.replay(context.step, hooks)
                    values[i] = checked_metric(self.metric, run.output)
        return torch.stack([values[i] for i in range(len(cells))])

    def _flags(self) -> AbstractContextManager[None]:
        """The denoiser with the hooks that patches need."""
        return nullcontext()

    def _context(self, row: Any) -> Context:
        return next(
            c
            for c in self.pair.contexts
            if all(getattr(row, key) == value for key, value in c.coords.items())
        )


def _hooks(patch: Patch, prefix: str, differences: Mapping[str, Tensor]) -> list[Any]:
    change = differences[prefix + patch.sender]
    if patch.minus is not None:
        change = change - fitted(differences[prefix + patch.minus], change)
    change = change[patch.sender_part]
    hooks = [(prefix + patch.receiver, partial(_add, patch.receiver_part, change))]
    if patch.undo is not None:
        hooks.append((prefix + patch.undo, partial(_add, patch.receiver_part, -change)))
    return hooks


def _add(index: tuple[Any, ...], change: Tensor, tensor: Tensor, hook: Any) -> Tensor:
    edited = tensor.clone()
    edited[index] += fitted(change, edited[index])
    return edited


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """`x` with as many positions as another, of which the image's come first.

    Some last blocks give no text.

    Example:
        >>> fitted(torch.ones(1, 5, 2), torch.ones(1, 3, 2)).shape
        torch.Size([1, 3, 2])
    """
    if x.shape == like.shape:
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, like.shape[1] - x.shape[1]))


def labelled(
    pair: Pair, found: Mapping[int, tuple[tuple[str, ...], np.ndarray]], coords: Mapping[str, Any]
) -> xr.DataArray:
    """The contexts' arrays as one, with dims step and branch in front, if it has any.

    Arrays are given as index of the context → dims, values.
    """
    outer = {
        key: list(dict.fromkeys(c.coords[key] for c in pair.contexts))
        for key in pair.contexts[0].coords
    }
    dims, first = found[0]
    values = np.stack([found[i][1] for i in range(len(pair.contexts))]).reshape(
        *map(len, outer.values()), *first.shape
    )
    labels = {
        **outer,
        **{
            dim: coords.get(dim, np.arange(size))
            for dim, size in zip(dims, first.shape, strict=True)
        },
    }
    return xr.DataArray(values, coords=labels, dims=(*outer, *dims), name="score")


def ranked(scores: xr.DataArray) -> pd.DataFrame:
    """Mean scores over prompts in one table, the largest magnitude first.

    Example:
        >>> ranked(xr.DataArray([[1.0, -3.0]], dims=("prompt", "head")))["score"].tolist()
        [-3.0, 1.0]
    """
    table = (
        scores.mean("prompt").rename("score").to_dataframe().reset_index().dropna(subset="score")
    )
    return table.sort_values("score", key=np.abs, ascending=False, ignore_index=True)
