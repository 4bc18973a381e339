"""Attention between groups of positions, summed up inside every attention of a run; no pattern is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import Trajectory
from hooked_models.dit import TextState
from hooked_models.hooked_module import HookedModule, HookFunction, watched
from hooked_models.names import Branch

from .shipped import sums_of_attention, sums_of_pattern

Sublayer = Literal["cross_attn", "attn"]


def attention_between(
    run: Trajectory,
    sublayer: Sublayer,
    queries: Float[Tensor, "batch pos group"],
    keys: Mapping[Branch, Float[Tensor, "batch key_pos key_group"]],
    reduce: Literal["sum", "max"],
) -> Float[Tensor, "batch layer head step branch group key_group"]:
    """Run again from the first state, and add up every attention of the sublayer as the hooks attached to the model leave it.

    Args:
        queries, keys: each position's weight in each group. Text positions beyond the run's are pads, which get no attention.
        reduce: "sum" over pairs of positions, each with the product of their weights, or the largest entry among pairs where
            neither weight is 0, and 0 if there is none.

    Returns:
        On the CPU, at least in float32. Branches as in `keys`.
    """
    model, text, cfg = run.model, run.inputs.text, run.model.cfg
    steps, device, n = run.inputs.sampler.num_steps, model.device, len(queries)
    dtype = torch.promote_types(model.dit.dtype, torch.float32)
    order = sorted(keys, key=lambda branch: run.inputs.rows(branch).start)  # as in the denoiser's rows
    rows = slice(run.inputs.rows(order[0]).start, run.inputs.rows(order[-1]).stop)
    weights, bias = torch.cat([keys[branch] for branch in order]).to(device, dtype), None
    if sublayer == "cross_attn":
        weights = weights[:, : text.text.shape[1]]
        bias = None if text.bias is None else text.bias[rows, None]
    groups = (queries.shape[-1], weights.shape[-1])
    queries = queries.to(device, dtype).repeat(len(order), 1, 1)
    found = torch.zeros(len(queries), cfg.n_layers, cfg.n_heads, steps, *groups, dtype=dtype, device=device)

    def denoise(x: Tensor, timestep: Tensor, sizes: dict[str, Tensor | None], text: TextState, step: int) -> Tensor:
        hooks: list[tuple[str, HookFunction]] = []
        for layer in range(cfg.n_layers):
            attention: Any = model.dit.get_submodule(inner := f"blocks.{layer}.{sublayer}")
            reader = _Reader(queries, weights, bias, attention.scale, reduce, found[:, layer, :, step], rows)
            if watched(attention.hook_attn_scores) or watched(attention.hook_pattern):
                hooks.append((f"{inner}.hook_pattern", reader.read_pattern))
            else:
                hooks += [(f"{inner}.hook_q", reader.read_q), (f"{inner}.hook_k", reader.read_k)]
        with model.dit.hooks(hooks):  # within a step, so that they see what hooks that are attached to the model leave
            return model._denoise(x, timestep, sizes, text)

    run.check_fork(0, steps)
    state = run.states[0]
    for step in range(steps):
        state = model._step(run.inputs, state, partial(denoise, step=step))
    by_branch = dict(zip(order, found.split(n), strict=True))
    return torch.stack([by_branch[branch] for branch in keys], dim=4).cpu()


def attention_in_call(
    model: HookedModule,
    inputs: Mapping[str, Any],
    queries: Float[Tensor, "batch pos group"],
    keys: Float[Tensor, "batch key_pos key_group"],
    sublayer: str = "attn",
    reduce: Literal["sum", "max"] = "sum",
) -> Float[xr.DataArray, "row layer head query_group key_group"]:
    """As `attention_between`, in one call of any hooked transformer (`hooked_models.families`): `model(**inputs)`.

    Positions of attention over both streams are [image, text]. Layers without this attention are NaN.
    """
    cfg, device = model.cfg, queries.device
    shape = (len(queries), cfg.n_layers, cfg.n_heads, queries.shape[-1], keys.shape[-1])
    found = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
    hooks: list[tuple[str, HookFunction]] = []
    for layer in range(cfg.n_layers):
        inner = f"blocks.{layer}.{sublayer}"
        if f"{inner}.hook_q" not in model.hook_dict:
            continue
        found[:, layer] = 0
        attention: Any = model.get_submodule(inner)
        reader = _Reader(queries.float(), keys.float(), None, 0.0, reduce, found[:, layer], slice(None))
        hooks += [(f"{inner}.hook_q", reader.read_q), (f"{inner}.hook_k", _knowing(reader, attention))]
    if not hooks:
        model.canonical_name(f"blocks.0.{sublayer}.hook_q")  # raises, and says why there is none
    with torch.no_grad(), model.hooks(hooks):
        model(**inputs)
    dims = ("row", "layer", "head", "query_group", "key_group")
    return xr.DataArray(found.cpu().numpy(), dims=dims, name=f"{sublayer} {reduce}")


def _knowing(reader: _Reader, attention: Any) -> HookFunction:
    def read_k(k: Tensor, hook: HookPoint) -> None:
        reader.bias, reader.scale = attention.bias, attention.scale
        reader.read_k(k, hook)

    return read_k


@dataclass(repr=False)  # TransformerLens asks every hook for it, and it would print the tensors
class _Reader:
    """Hooks on one attention in one call: each adds what it sees up and keeps nothing else."""

    queries: Float[Tensor, "batch pos group"]
    keys: Float[Tensor, "batch key_pos key_group"]
    bias: Float[Tensor, "batch #head _ key_pos"] | None
    scale: float
    reduce: Literal["sum", "max"]
    found: Float[Tensor, "batch head group key_group"]
    """Written to."""
    rows: slice
    """Of the call, that are read."""

    def read_q(self, q: Float[Tensor, "row pos head d_head"], hook: HookPoint) -> None:
        self.q = q[self.rows]

    def read_k(self, k: Float[Tensor, "row key_pos head d_head"], hook: HookPoint) -> None:
        self.found[:] = sums_of_attention(self.q, k[self.rows], self.bias, self.scale, self.queries, self.keys, self.reduce)
        del self.q

    def read_pattern(self, pattern: Float[Tensor, "row head pos key_pos"], hook: HookPoint) -> None:
        self.found[:] = sums_of_pattern(pattern[self.rows], self.queries, self.keys, self.reduce)
