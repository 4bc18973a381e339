"""Attention between groups of positions, summed inside each attention; no pattern is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.generation.loops import Call, RunInputs
from hooked_models.generation.names import Branch
from hooked_models.generation.trajectory import Run
from hooked_models.hooks.module import HookedModule, has_hooks
from hooked_models.hooks.scopes import scope
from hooked_models.hooks.table import JOINT_POSITIONS, TEXT_POSITIONS

from .group_sums import CallSums, Groups

Sublayer = Literal["cross_attn", "attn", "image_attn"]


def attention_between(
    model: HookedTextToImage,
    inputs: RunInputs,
    sublayer: Sublayer,
    queries: Float[Tensor, "batch pos group"],
    keys: Mapping[Branch, Float[Tensor, "batch key_pos key_group"]],
    reduce: Literal["sum", "max"],
) -> Float[Tensor, "batch layer head step branch group key_group"]:
    """Generate from `inputs` and sum each attention of the sublayer, after the attached hooks.

    Args:
        model: a hooked text-to-image model; its attached hooks act.
        inputs: of the run, with their text encoded.
        sublayer: "cross_attn", "attn" or "image_attn".
        queries: weight of each image position in each group.
        keys: branch → weight of each key position in each group. Text positions beyond the run's
            are pads, which get no attention.
        reduce: "sum" over pairs of positions, each with the product of their weights, or "max", the
            largest entry among pairs of non-zero weights (0 if there is none).

    Returns:
        On the CPU, at least in float32. Branches as in `keys`.

    Example:
        >>> inputs = model.prepare("red circle is above blue square", num_steps=2)
        >>> image, text = torch.ones(1, 64, 1), torch.ones(1, 7, 1)
        >>> attention_between(model, inputs, "cross_attn", image, {"cond": text}, "sum").shape
        torch.Size([1, 3, 3, 2, 1, 1, 1])
    """
    cfg = model.cfg
    dtype = torch.promote_types(model.dit.dtype, torch.float32)
    places = {
        branch: placed(model, inputs, sublayer, branch, queries.to(dtype), keys[branch].to(dtype))
        for branch in keys
    }
    attentions = attentions_of(model.dit, sublayer)
    layers = list(attentions)
    sizes = queries.shape[-1], next(iter(keys.values())).shape[-1]
    shape = len(inputs.solver), cfg.n_layers, len(queries), cfg.n_heads, *sizes
    found = {
        branch: torch.full(shape, torch.nan, dtype=dtype, device=model.device) for branch in keys
    }

    @cache
    def groups(branches: tuple[Branch, ...], device: torch.device) -> Groups:
        ours, theirs = (
            torch.cat([places[branch][side] for branch in branches]).to(device) for side in (0, 1)
        )
        return Groups(ours, theirs, reduce)

    def denoise(call: Call, rows: Any, x: Tensor, timestep: Tensor, text: Any) -> Tensor:
        if not set(call.branches) <= set(keys):
            return model.denoise(x, timestep, text)
        sums = CallSums(groups(call.branches, x.device), list(attentions.values()), cfg.n_heads)
        with reading(model.dit, sums.readers):  # after the attached hooks
            prediction = model.denoise(x, timestep, text)
        for branch in call.branches:
            here = sums.taken()[:, call.part(branch)]
            found[branch][call.step, layers] = here.to(model.device)
        return prediction

    model.run(inputs, denoise=denoise)
    return torch.stack([found[branch] for branch in keys]).permute(3, 2, 4, 1, 0, 5, 6).cpu()


def attentions_of(dit: Any, sublayer: str) -> dict[int, Any]:
    """Layer → its attention of this name.

    For "cross_attn" of a model that joins its streams, the attention over both.

    Raises:
        UnknownHookError: the denoiser has none, with the reason where it is known.

    Example:
        >>> list(attentions_of(HookedTextToImage.from_pretrained("rte-nano").dit, "cross_attn"))
        [0, 1, 2]
    """
    for name in ("cross_attn", "attn") if sublayer == "cross_attn" else (sublayer,):
        places = {layer: f"blocks.{layer}.{name}" for layer in range(dit.cfg.n_layers)}
        found = {
            layer: dit.get_submodule(path)
            for layer, path in places.items()
            if f"{path}.hook_q" in dit.mod_dict
        }
        if found:
            return found
    dit.canonical_name(f"blocks.0.{sublayer}.hook_q")  # raises
    raise AssertionError(sublayer)


def placed(
    model: Any,
    inputs: Any,
    sublayer: str,
    branch: Branch,
    queries: Float[Tensor, "batch pos group"],
    keys: Float[Tensor, "batch own_pos key_group"],
) -> tuple[Float[Tensor, "batch query_pos group"], Float[Tensor, "batch key_pos key_group"]]:
    """Weights of a branch's rows at the positions of its attention.

    These are the image's or the text's, or both, the image first.

    Args:
        model: the model that the inputs belong to.
        inputs: of a run of `model`, or a draft.
        sublayer: "cross_attn", "attn" or "image_attn".
        branch: guidance branch, whose text sets the positions.
        queries: weight of each image position in each group.
        keys: weight of each text position (of the prompt's tokens), or image position in "attn" of
            PixArt.

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> draft = model.draft("red circle is above blue square", num_steps=2)
        >>> image, text = torch.ones(1, 64, 1), torch.ones(1, 20, 1)
        >>> [tuple(side.shape) for side in placed(model, draft, "cross_attn", "cond", image, text)]
        [(1, 64, 1), (1, 7, 1)]
    """
    layout, layer = model.layout(inputs, branch), next(iter(attentions_of(model.dit, sublayer)))
    name = (
        "cross_attn"
        if f"blocks.{layer}.cross_attn.hook_q" in model.dit.mod_dict and sublayer == "cross_attn"
        else "attn"
    )
    name = sublayer if sublayer == "image_attn" else name
    of_text = sublayer == "cross_attn"
    keys = keys[:, : layout.text_mask.shape[1]] if of_text else keys
    sides = []
    for weights, point, before in (
        (queries, "hook_q", 0),
        (keys, "hook_k", layout.n_image if of_text else 0),
    ):
        axis = model.dit.axes(f"blocks.{layer}.{name}.{point}")[1]
        stream = (
            "joint" if axis in JOINT_POSITIONS else "text" if axis in TEXT_POSITIONS else "image"
        )
        before = before if stream == "joint" else 0
        more = layout.length(stream) - before - weights.shape[1]
        sides.append(torch.nn.functional.pad(weights, (0, 0, before, more)))
    return sides[0], sides[1]


def attention_in_call(
    model: HookedModule,
    inputs: Mapping[str, Any],
    queries: Float[Tensor, "batch pos group"],
    keys: Float[Tensor, "batch key_pos key_group"],
    sublayer: str = "attn",
    reduce: Literal["sum", "max"] = "sum",
) -> Float[xr.DataArray, "row layer head query_group key_group"]:
    """Apply `attention_between` to one call `model(**inputs)` of any hooked transformer.

    Positions of attention over both streams are [image, text]. Layers without this attention are
    NaN.
    """
    cfg = model.cfg
    attentions = {
        layer: model.get_submodule(f"blocks.{layer}.{sublayer}")
        for layer in range(cfg.n_layers)
        if f"blocks.{layer}.{sublayer}.hook_q" in model.hook_dict
    }
    if not attentions:
        model.canonical_name(f"blocks.0.{sublayer}.hook_q")  # raises, with the reason
    groups = Groups(queries.float(), keys.float(), reduce)
    sums = CallSums(groups, list(attentions.values()), cfg.n_heads)
    with torch.no_grad(), reading(model, sums.readers):
        model(**inputs)
    shape = (len(queries), cfg.n_layers, cfg.n_heads, queries.shape[-1], keys.shape[-1])
    found = torch.full(shape, torch.nan)
    found[:, list(attentions)] = sums.taken().transpose(0, 1).cpu()
    dims = ("row", "layer", "head", "query_group", "key_group")
    return xr.DataArray(found.numpy(), dims=dims, name=f"{sublayer} {reduce}")


@runtime_checkable
class Reader(Protocol):
    """A reducer of one attention in one call: of q, k and bias, or of a pattern that hooks make."""

    def read(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Any:
        """Called with q [batch pos head d_head], k and the bias of the scores.

        Returns None, or a callback for the kernel's log-sum-exp (`AttentionCore.on_qk`).
        """

    def read_pattern(self, pattern: Tensor, hook: HookPoint) -> None:
        """Called with the pattern [batch head pos key_pos]."""


@contextmanager
def reading(model: HookedModule, readers: Mapping[Any, Reader]) -> Iterator[None]:
    """Attach a reader to each attention: to q and k, or to the pattern if hooks may change it."""
    explicit = [
        one for one in readers if has_hooks(one.hook_attn_scores) or has_hooks(one.hook_pattern)
    ]
    fused = [one for one in readers if one not in explicit]
    with (
        scope() as inner,
        model.hooks([(one.hook_pattern.name, readers[one].read_pattern) for one in explicit]),
    ):
        inner.values |= {(id(one), "on_qk"): readers[one].read for one in fused}
        yield


def run_reading(model: Any, inputs: Any, readers: Callable[[Call], Mapping[Any, Reader]]) -> Run:
    """Generate from `inputs` while readers of attentions see the calls with a conditional branch.

    Args:
        model: a hooked text-to-image model; its attached hooks act.
        inputs: inputs of a run of `model`, one row a prompt.
        readers: the readers of one call, by attention; empty for a call that does not count.

    Example:
        >>> begun = model.trajectory("red circle", num_steps=2, until=0)
        >>> len(run_reading(model, begun.inputs, lambda call: {}).record)
        2
    """

    def denoise(call: Call, rows: Any, x: Tensor, timestep: Any, text: Any) -> Tensor:
        chosen = readers(call) if "cond" in call.branches else {}
        with reading(model.dit, chosen) if chosen else nullcontext():
            return model.denoise(x, timestep, text)

    return model.run(inputs, denoise=denoise)


def cond_rows(call: Call, given: int) -> slice:
    """Rows of the conditional branch, of `given` rows of a call.

    Leading rows whose prompt is empty may have been left out.

    Example:
        >>> (
        ...     cond_rows(Call(0, ("uncond", "cond"), 2), 4),
        ...     cond_rows(Call(0, ("uncond", "cond"), 2), 2),
        ... )
        (slice(2, 4, None), slice(0, 2, None))
    """
    part, missing = call.part("cond"), call.rows * len(call.branches) - given
    return slice(part.start - missing, part.stop - missing)
