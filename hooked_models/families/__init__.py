"""Diffusion transformers beyond PixArt. `hook(transformer)` finds the family by its class; a new one is a small file here.

    model = hook(pipe.transformer)
    output, cache = model.run_with_cache(**inputs, names_filter=lambda name: name.endswith("attn.hook_pattern"))

Every family has `blocks.{l}.{attn or cross_attn}.hook_{q,k,v,attn_scores,pattern,z}`, and what `SUPPORTED` says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..hooks import HookedModule
from ..pipelines.checks import check_denoiser, failures_of, refuse
from ..pixart.dit import HookedDiT
from . import class_dit, flux, sana, sd3
from .adapter import Family, FamilyModel
from .class_dit import HookedClassDiT

SUPPORTED: dict[str, Family] = {module.FAMILY.transformer: module.FAMILY for module in (sd3, flux, sana)}
"""The class of the transformer → its family."""
NATIVE: dict[str, type[HookedModule]] = {
    "PixArtTransformer2DModel": HookedDiT,
    "Transformer2DModel": HookedDiT,
    "DiTTransformer2DModel": HookedClassDiT,
}
"""Of these, every tensor has a name."""
UNSUPPORTED: dict[str, str] = {
    "Lumina2Transformer2DModel": "its heads share keys (grouped-query attention), which the shared names cannot tell apart",
    "WanTransformer3DModel": "it draws video; its positions have an axis of time, which the shared names lack",
    "CogVideoXTransformer3DModel": "it draws video; its positions have an axis of time, which the shared names lack",
}
"""Looked at and left out, with the reason."""

__all__ = ["NATIVE", "SUPPORTED", "UNSUPPORTED", "Family", "FamilyModel", "HookedClassDiT", "hook"]


def hook(transformer: nn.Module, check: bool = True) -> Any:
    """A live diffusers transformer as a hooked model; its weights are used, not copied.

    Args:
        check: compare it with the original on a small random input, as at loading.

    Raises:
        ValueError: its family is not supported; the message says which are.
        ModelCheckError: a check failed.
    """
    kind = type(transformer).__name__
    if kind not in NATIVE and kind not in SUPPORTED:
        reason = f"{kind} is not supported: {UNSUPPORTED[kind]}." if kind in UNSUPPORTED else f"{kind} is of no known family."
        known = ", ".join([*NATIVE, *SUPPORTED])
        raise ValueError(f"{reason} Known are {known}; a new family is a small file in hooked_models/families.")
    model: Any = NATIVE[kind](transformer) if kind in NATIVE else FamilyModel(transformer, SUPPORTED[kind])
    if check:
        with torch.no_grad():
            refuse(kind, [f"its {failure}" for failure in _failures(model)])
    return model


def _failures(model: Any) -> list[str]:
    if isinstance(model, HookedDiT):
        return check_denoiser(model)
    if isinstance(model, HookedClassDiT):
        return failures_of(model, model.wrapped, class_dit.inputs(model.wrapped), ("attn",))
    inputs = model.family.inputs(model.wrapped)
    sublayers = [name for name in model.family.attentions if any(f".{name}.hook_" in hook for hook in model.hook_dict)]
    return failures_of(model, model.wrapped, inputs, sublayers) + misplaced_text(model, inputs)


def misplaced_text(model: FamilyModel, inputs: Mapping[str, Any]) -> list[str]:
    """Whether other text changes the first keys where the text is, and there alone."""
    name, text = f"blocks.0.{'cross_attn' if model.family.text == 'cross' else 'attn'}.hook_k", inputs["encoder_hidden_states"]
    before, after = (
        model.run_with_cache(**{**inputs, "encoder_hidden_states": words}, names_filter=name)[1][name] for words in (text, -text)
    )
    changed = (before != after).any(dim=(0, 2, 3))
    n_image = len(changed) - text.shape[1]
    in_place = not bool(changed[:n_image].any()) and bool(changed[n_image:].all())
    return [] if in_place else [f"text is not at the last {text.shape[1]} positions of {name}"]
