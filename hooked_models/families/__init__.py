"""Diffusion transformers beyond PixArt.

`hook(transformer)` finds the family by its class; a new one is a small file here.

    model = hook(pipe.transformer)
    patterns = lambda name: name.endswith("attn.hook_pattern")
    output, cache = model.run_with_cache(**inputs, names_filter=patterns)

Every family has `blocks.{l}.{attn or cross_attn}.hook_{q,k,v,attn_scores,pattern,z}`, and the
tensors that `SUPPORTED` lists for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..hooks.module import HookedModule
from ..pipelines.checks import check_denoiser, failures_of, raise_failures
from ..pixart.dit import HookedDiT
from . import (
    aura_flow,
    bria,
    chroma,
    class_dit,
    cogvideox,
    cogview3,
    cogview4,
    ernie_image,
    flux,
    flux2,
    flux3,
    glm_image,
    hidream,
    hunyuan_dit,
    hunyuan_video,
    ideogram4,
    kandinsky5,
    krea2,
    longcat_image,
    ltx,
    lumina2,
    ovis_image,
    prx,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
from .adapter import Family, FamilyModel
from .check import failures
from .class_dit import HookedClassDiT

LISTED = (
    *(
        sd3,
        flux,
        flux2,
        flux3,
        qwen_image,
        z_image,
        sana,
        chroma,
        cogview3,
        cogview4,
        lumina2,
        aura_flow,
        hunyuan_dit,
        krea2,
    ),
    *(longcat_image, bria, ovis_image, prx, hidream, ernie_image, kandinsky5, glm_image, ideogram4),
    *(wan, ltx, hunyuan_video, cogvideox),
)
SUPPORTED: dict[str, Family] = {module.FAMILY.transformer: module.FAMILY for module in LISTED}
"""The class of the transformer → its family."""
NATIVE: dict[str, type[HookedModule]] = {
    "PixArtTransformer2DModel": HookedDiT,
    "Transformer2DModel": HookedDiT,
    "DiTTransformer2DModel": HookedClassDiT,
}
"""Classes in which every tensor has a name."""
UNSUPPORTED: dict[str, str] = {
    "QwenImage21Transformer2DModel": (
        "its attention calls the kernel several times in one call, for a prefix and the rest"
    ),
}
"""Looked at and left out, with the reason."""

__all__ = [
    "NATIVE",
    "SUPPORTED",
    "UNSUPPORTED",
    "Family",
    "FamilyModel",
    "HookedClassDiT",
    "check_known",
    "hook",
]


def hook(transformer: nn.Module, check: bool = True, first: Any = None) -> Any:
    """A live diffusers transformer as a hooked model; its weights are used, not copied.

    Args:
        transformer: a transformer of a supported family, on any device.
        check: compare it with the original on a small random input, as at loading.
        first: the hooked model of another transformer of the same shape, whose hooks act in this
            one too.

    Raises:
        ValueError: its family is not supported; the message says which are.
        ModelCheckError: a check failed.
    """
    kind = type(transformer).__name__
    if kind == "OptimizedModule":
        raise ValueError(
            "The transformer is wrapped by torch.compile, which hooks cannot see through: put back "
            "what it wraps, pipe.transformer = pipe.transformer._orig_mod, and compile that in "
            "place, pipe.transformer.compile(): calls without hooks stay compiled, calls with "
            "hooks run as they are written."
        )
    check_known(kind)
    model: Any = (
        NATIVE[kind](transformer)
        if kind in NATIVE
        else FamilyModel(transformer, SUPPORTED[kind], first)
    )
    if check:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            raise_failures(kind, [f"its {failure}" for failure in _failures(model)])
    return model


def check_known(kind: str) -> None:
    """Raise ValueError for a class of transformers whose family is not supported.

    Example:
        >>> check_known("UNet2DModel")
        Traceback (most recent call last):
        ValueError: UNet2DModel is of no known family. Known are PixArtTransformer2DModel, ...
    """
    if kind not in NATIVE and kind not in SUPPORTED:
        reason = (
            f"{kind} is not supported: {UNSUPPORTED[kind]}."
            if kind in UNSUPPORTED
            else f"{kind} is of no known family."
        )
        known = ", ".join([*NATIVE, *SUPPORTED])
        raise ValueError(
            f"{reason} Known are {known}; a new family is a small file in hooked_models/families."
        )


def _failures(model: Any) -> list[str]:
    if isinstance(model, HookedDiT):
        return check_denoiser(model)
    if isinstance(model, HookedClassDiT):
        return failures_of(model, model.wrapped, class_dit.inputs(model.wrapped), ("attn",))
    found = failures(model)
    model.layout = None  # of the check's own inputs
    return found
