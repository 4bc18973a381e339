"""Diffusion transformers beyond PixArt. `hook(transformer)` finds the family by its class; a new one is a small file here.

    model = hook(pipe.transformer)
    output, cache = model.run_with_cache(**inputs, names_filter=lambda name: name.endswith("attn.hook_pattern"))

Every family has `blocks.{l}.{attn or cross_attn}.hook_{q,k,v,attn_scores,pattern,z}`, and what `SUPPORTED` says of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..hooks import HookedModule
from ..pipelines.checks import check_denoiser, failures_of, refuse
from ..pixart.dit import HookedDiT
from . import class_dit, flux, flux3, lumina2, prx, sana, sd3
from .adapter import Family, FamilyModel
from .check import failures
from .class_dit import HookedClassDiT

SUPPORTED: dict[str, Family] = {module.FAMILY.transformer: module.FAMILY for module in (sd3, flux, sana, flux3, lumina2, prx)}
"""The class of the transformer → its family."""
NATIVE: dict[str, type[HookedModule]] = {
    "PixArtTransformer2DModel": HookedDiT,
    "Transformer2DModel": HookedDiT,
    "DiTTransformer2DModel": HookedClassDiT,
}
"""Of these, every tensor has a name."""
UNSUPPORTED: dict[str, str] = {
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
    return failures(model)
