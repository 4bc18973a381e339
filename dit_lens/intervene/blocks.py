"""Whole blocks as places to intervene.

Remove them, scale their text, move patterns to the identity.

    with model.hooks(remove_blocks(model, 3) + scale_text(model, [4, 5], 2.0)):
        images = model(prompts, seed=0)

Each function returns `fwd_hooks` for any hooked text-to-image model. Sources: blocks removed, their
text disabled (factor 0) or enhanced (2), arXiv 2601.02211; attention replaced by the identity,
perturbed-attention guidance (arXiv 2403.17377), in degrees and in chosen heads, SoftPAG (arXiv
2506.10978).

Hooks are sent to a server as source with the variables they close over, which a run-time type
checker's wrapper would hide: `no_type_check` keeps it away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import integers, is_several, number, one_of
from hooked_models.generation.capture import Heads, heads_by_layer
from hooked_models.hooks.module import HookFunction
from hooked_models.hooks.table import JOINT_POSITIONS

FwdHooks = list[tuple[str | Callable[[str], bool], HookFunction]]
Branches = Literal["cond", "uncond", "both"]
Layers = int | Sequence[int] | None
StepChoice = int | Sequence[int] | None


@dataclass(frozen=True)
class Where:
    """Predicate on full hook names: one hook of some layers, at some steps, in some branches.

    Example:
        >>> where = Where("hook_resid_pre", frozenset({2}), None, "cond")
        >>> (
        ...     where("steps.0.cond.blocks.2.hook_resid_pre"),
        ...     where("steps.0.cond.blocks.1.hook_resid_pre"),
        ... )
        (True, False)
    """

    leaf: str
    layers: frozenset[int]
    steps: frozenset[int] | None
    branch: Branches

    def __call__(self, name: str) -> bool:
        """True if the hook is one of them."""
        found = re.fullmatch(r"steps\.(\d+)\.(cond|uncond)\.blocks\.(\d+)\.(.+)", name)
        if found is None or found[4] != self.leaf or int(found[3]) not in self.layers:
            return False
        return (self.steps is None or int(found[1]) in self.steps) and self.branch in (
            "both",
            found[2],
        )


def places(
    model: HookedTextToImage, layers: Layers, steps: StepChoice, branch: Branches
) -> Callable[[str], Where]:
    """Hook within a block → its names at these layers, steps and branches.

    Raises:
        ValueError: the model has no such layer, or a step counts from the end.

    Example:
        >>> sorted(places(model, None, 0, "cond")("hook_resid_pre").layers)
        [0, 1, 2]
    """
    n_layers = model.dit.cfg.n_layers
    chosen = (
        range(n_layers)
        if layers is None
        else integers("layers", layers if is_several(layers) else [layers])
    )
    if wrong := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise ValueError(f"There is no layer {wrong[0]}: the model has layers 0 to {n_layers - 1}.")
    at = (
        None
        if steps is None
        else frozenset(integers("steps", steps if is_several(steps) else [steps], 0))
    )
    one_of("branch", branch, ("cond", "uncond", "both"))
    return lambda leaf: Where(leaf, frozenset(chosen), at, branch)


def remove_blocks(
    model: HookedTextToImage,
    layers: int | Sequence[int],
    *,
    steps: StepChoice = None,
    branch: Branches = "both",
) -> FwdHooks:
    """Let blocks hand on the residual streams, image and text, as they receive them.

    Args:
        model: any hooked text-to-image model; its layers are checked.
        layers: one or several, counted through all lists of blocks.
        steps: from 0; by default all.
        branch: guidance branches that are edited.

    Example:
        >>> model.run_with_hooks("red circle", num_steps=1, fwd_hooks=remove_blocks(model, 1)).shape
        torch.Size([1, 3, 128, 128])
    """
    held: dict[str, Tensor] = {}
    where = places(model, layers, steps, branch)

    @no_type_check
    def keep(x: Tensor, hook: HookPoint) -> None:
        held[hook.name] = x.clone()

    @no_type_check
    def give_back(x: Tensor, hook: HookPoint) -> Tensor:
        before = held.pop(str(hook.name).replace("resid_post", "resid_pre"))
        return before[:, : x.shape[1]]  # a last block may return the image's stream alone

    return [(where("hook_resid_pre"), keep), (where("hook_resid_post"), give_back)]


def scale_text(
    model: HookedTextToImage,
    layers: Layers,
    factor: float,
    *,
    steps: StepChoice = None,
    branch: Branches = "both",
) -> FwdHooks:
    """Scale the text that blocks read: its residual stream, or keys and values of cross-attention.

    In a model with joint attention the scaled stream also leaves the block; in cross-attention the
    text itself is scaled, so that biases of keys and values stay as they are.

    Args:
        model: any hooked text-to-image model; biases of its keys and values are read.
        layers: one or several; None for all.
        factor: 0 removes the text's content, 2 doubles it.
        steps: from 0; by default all.
        branch: guidance branches that are edited.

    Raises:
        NotImplementedError: the model joins its streams, and is behind nnsight.
        ValueError: a block's keys pass a norm, so that a scaled text has no effect on them.

    Example:
        >>> hooks = scale_text(model, [0, 1], 0.0)
        >>> model.run_with_hooks("red circle", num_steps=1, fwd_hooks=hooks).shape
        torch.Size([1, 3, 128, 128])
    """
    where, factor, dit = places(model, layers, steps, branch), number("factor", factor), model.dit
    chosen = sorted(where("").layers)
    joint = [
        layer
        for layer in chosen
        if dit.axes(f"blocks.{layer}.hook_resid_pre")[1] in JOINT_POSITIONS
    ]
    crossing = [layer for layer in chosen if layer not in joint]
    if joint and model.behind_nnsight:
        raise NotImplementedError(
            "The text's positions in a joint stream are those of a call, which happens behind "
            "nnsight: scale them by an Intervention on hook_resid_pre, with tokens=…."
        )

    @no_type_check
    def scaled_stream(x: Tensor, hook: HookPoint) -> Tensor:
        layout: Any = dit.layout
        scaled = x.clone()
        scaled[:, layout.n_image : layout.n_image + layout.text_mask.shape[1]] *= factor
        return scaled

    hooks: FwdHooks = []
    if joint:
        hooks.append((places(model, joint, steps, branch)("hook_resid_pre"), scaled_stream))
    for layer in crossing:
        for which in ("k", "v"):
            bias = text_bias(dit.get_submodule(f"blocks.{layer}.cross_attn"), which.upper())

            @no_type_check
            def scaled_projection(x: Tensor, hook: HookPoint, bias: Tensor | None = bias) -> Tensor:
                return factor * x if bias is None else bias + factor * (x - bias)

            hooks.append(
                (places(model, layer, steps, branch)(f"cross_attn.hook_{which}"), scaled_projection)
            )
    return hooks


def text_bias(attention: Any, which: str) -> Tensor | None:
    """Bias [head d_head] of the keys ("K") or values ("V") of a cross-attention.

    Raises:
        ValueError: a norm follows the projection.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> text_bias(dit.blocks[0].cross_attn, "K").shape
        torch.Size([3, 64])
    """
    if hasattr(attention, f"b_{which}"):
        return getattr(attention, f"b_{which}")
    live = attention.weights.attention
    if which == "K" and getattr(live, "norm_k", None) is not None:
        raise ValueError(
            f"The keys of {type(live).__name__} pass a norm, which undoes a scaled text: scale its "
            "values instead, Intervention('blocks.*.cross_attn.hook_v', action=Scale(2.0))."
        )
    bias = {"K": live.to_k, "V": live.to_v}[which].bias
    return None if bias is None else bias.reshape(attention.weights.n_heads, -1)


def toward_identity(
    model: HookedTextToImage,
    heads: Heads | None,
    strength: float = 1.0,
    *,
    sublayer: Literal["attn", "image_attn"] = "attn",
    steps: StepChoice = None,
    branch: Branches = "both",
) -> FwdHooks:
    """Move patterns of self-attention toward the identity: (1 − strength) · pattern + strength · 1.

    A pattern acts on values linearly, so outputs are moved toward values, and the kernel stays
    fused.

    Args:
        model: any hooked text-to-image model with self-attention.
        heads: "L2H8", a head of every layer by its number, or several; None for all heads.
        strength: 0 changes nothing; 1 is the identity, which perturbed-attention guidance uses.
        sublayer: "attn", or "image_attn" of blocks that have a second one for the image alone.
        steps: from 0; by default all.
        branch: guidance branches that are edited.

    Raises:
        ValueError: the model has no such attention, or no such head.

    Example:
        >>> hooks = toward_identity(model, ["L1H0", "L1H2"], 0.5)
        >>> model.run_with_hooks("red circle", num_steps=1, fwd_hooks=hooks).shape
        torch.Size([1, 3, 128, 128])
    """
    cfg, strength = model.dit.cfg, number("strength", strength)
    chosen = heads_by_layer(heads, cfg.n_layers, cfg.n_heads)
    own = [
        layer
        for layer in range(cfg.n_layers)
        if f"blocks.{layer}.{sublayer}.hook_z" in model.dit.hook_dict
    ]
    layers = own if chosen is None else list(chosen)
    if not layers or not set(layers) <= set(own):
        raise ValueError(
            f"Layers {sorted(set(layers) - set(own)) or 'of this model'} have no {sublayer} with a "
            "pattern."
        )
    held: dict[str, Tensor] = {}
    where = places(model, layers, steps, branch)

    @no_type_check
    def keep(v: Tensor, hook: HookPoint) -> None:
        held[hook.name] = v.clone()

    @no_type_check
    def moved(z: Tensor, hook: HookPoint) -> Tensor:
        # queries may be the image's alone
        v = held.pop(str(hook.name).replace("hook_z", "hook_v"))[:, : z.shape[1]]
        if chosen is None:
            return z.lerp(v, strength)
        some, new = chosen[hook.layer()], z.clone()
        new[:, :, some] = z[:, :, some].lerp(v[:, :, some], strength)
        return new

    return [(where(f"{sublayer}.hook_v"), keep), (where(f"{sublayer}.hook_z"), moved)]
