"""Places of an intervention: the hooks of a site, the steps of a run, the axes of a tensor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.names import Site
from hooked_models.hooks.errors import unknown_hook
from hooked_models.hooks.layout import Layout as Positions
from hooked_models.hooks.table import JOINT_POSITIONS, POSITIONS, TEXT_POSITIONS, HookPart, axis_of


def counts_from_the_end(steps: Any) -> bool:
    """True if the steps depend on the length of the run: all, a slice, or counted from the end."""
    if steps is None or isinstance(steps, slice):
        return True
    return min(steps if isinstance(steps, tuple) else (steps,)) < 0


def find_hooks(model: HookedTextToImage, site: str) -> tuple[HookPart, list[str]]:
    """Part of a generation that a site lies in, and its canonical names there."""
    names = model.names
    if site.startswith(("steps.", "null_text_encoder.")):
        raise ValueError(
            f"{site!r}: a site has no step or branch in its name; say steps=… and branch=… instead."
        )
    inner = site.removeprefix("text_encoder.")
    part: HookPart = "dit"
    if inner != site:
        part = "text_encoder"
    elif inner in names.sampler.hook_dict:
        part = "sampler"
    module = {"dit": names.dit, "sampler": names.sampler, "text_encoder": names.text_encoder}[part]
    inners = (
        [inner.replace("*", str(layer)) for layer in range(module.cfg.n_layers)]
        if module and "*" in inner
        else [inner]
    )
    if module is None or not all(one in module.mod_dict for one in inners):
        owners = ((names.dit, ""), (names.sampler, ""), (names.text_encoder, "text_encoder."))
        raise unknown_hook(
            site, [f"{prefix}{one}" for owner, prefix in owners if owner for one in owner.hook_dict]
        )
    return part, [module.canonical_name(one) for one in inners]


class Layout(NamedTuple):
    """The axes of a tensor that an intervention selects on. Axis 0 is the batch."""

    ndim: int
    head: int | None
    token: int | None
    kind: Literal["image", "text", "joint"] | None
    """Row numbers of its positions."""
    registers: bool = True
    """False where positions are those of the prompt's own tokens alone."""


def layout_of(model: HookedTextToImage, site: Site) -> Layout:
    """Axes of a tensor that interventions select by.

    Example:
        >>> layout_of(model, model.hook_dict.site("steps.0.cond.blocks.0.cross_attn.hook_k")).kind
        'text'
    """
    axes = model.axes(site)
    positions = [axis for axis in axes if axis in (*POSITIONS["image"], *POSITIONS["text"])]
    if not positions:
        return Layout(len(axes), axis_of(axes, ("head",)), None, None)
    token = positions[-1]  # the keys of a pattern
    kind: Any = (
        "text" if token in TEXT_POSITIONS else "joint" if token in JOINT_POSITIONS else "image"
    )
    own = site.inner == "hook_text"
    return Layout(len(axes), axis_of(axes, ("head",)), axes.index(token), kind, not own)


def positions_there(
    positions: Positions, layout: Layout, words: Bool[Tensor, "prompt text_pos"]
) -> Bool[Tensor, "prompt pos"]:
    """The positions that can be attended to.

    Those of words, all of the image, or the image's and then those of words. Registers and padding
    that a model has beside them come last, and count as absent.
    """
    image = words.new_ones(len(words), positions.n_image)
    there = {"text": words, "image": image}.get(layout.kind or "", torch.cat([image, words], dim=1))
    more = positions.length(layout.kind or "joint") - there.shape[1] if layout.registers else 0
    return torch.nn.functional.pad(there, (0, more))
