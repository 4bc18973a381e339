"""Attention between groups of positions, summed up inside every attention of a run; no pattern is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage, Trajectory
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
    steps, device = run.inputs.sampler.num_steps, model.device
    dtype = torch.promote_types(model.dit.dtype, torch.float32)
    groups = (queries.shape[-1], next(iter(keys.values())).shape[-1])
    found = torch.zeros(len(queries), cfg.n_layers, cfg.n_heads, steps, len(keys), *groups, dtype=dtype, device=device)
    queries = queries.to(device, dtype)
    hooks: list[tuple[str, HookFunction]] = []
    for b, (branch, weights) in enumerate(keys.items()):
        weights, bias = weights.to(device, dtype), None
        if sublayer == "cross_attn":
            weights = weights[:, : text.text.shape[1]]
            bias = None if text.bias is None else text.bias[run.inputs.rows(branch), None]
        for layer in range(cfg.n_layers):
            inner = f"blocks.{layer}.{sublayer}"
            attention: Any = model.dit.get_submodule(inner)
            for step in range(steps):
                reader = _Reader(queries, weights, bias, attention.scale, reduce, found[:, layer, :, step, b])
                prefix = f"steps.{step}.{branch}.{inner}"
                if _is_explicit(model, step, inner):
                    hooks.append((f"{prefix}.hook_pattern", reader.read_pattern))
                else:
                    hooks += [(f"{prefix}.hook_q", reader.read_q), (f"{prefix}.hook_k", reader.read_k)]
    run.fork(0, hooks)
    return found.cpu()


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
        reader = _Reader(queries.float(), keys.float(), None, 0.0, reduce, found[:, layer])
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


def _is_explicit(model: HookedTextToImage, step: int, inner: str) -> bool:
    """Whether somebody looks at, and may change, the scores or the pattern, which are then computed for all rows of a step."""
    names = {f"{inner}.hook_attn_scores", f"{inner}.hook_pattern"}
    during_run = any(hook.site.step == step and hook.site.inner in names for hook in model._attached)
    return during_run or any(watched(model.dit.hook_dict[name]) for name in names)


@dataclass
class _Reader:
    """Hooks on one attention in one step and branch: each adds what it sees up and keeps nothing else."""

    queries: Float[Tensor, "batch pos group"]
    keys: Float[Tensor, "batch key_pos key_group"]
    bias: Float[Tensor, "batch #head _ key_pos"] | None
    scale: float
    reduce: Literal["sum", "max"]
    found: Float[Tensor, "batch head group key_group"]
    """Written to."""

    def read_q(self, q: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> None:
        self.q = q

    def read_k(self, k: Float[Tensor, "batch key_pos head d_head"], hook: HookPoint) -> None:
        self.found[:] = sums_of_attention(self.q, k, self.bias, self.scale, self.queries, self.keys, self.reduce)
        del self.q

    def read_pattern(self, pattern: Float[Tensor, "batch head pos key_pos"], hook: HookPoint) -> None:
        self.found[:] = sums_of_pattern(pattern, self.queries, self.keys, self.reduce)
