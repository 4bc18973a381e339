"""Z-Image: one stream, each row its image, then its text, both padded to multiples of 32.

Source: `ZImageTransformer2DModel` and `ZSingleStreamAttnProcessor` (diffusers 0.42); arXiv
2511.22699. Trap: padding takes part in attention, as learnt tokens. Refiners of text and image run
before the blocks named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

from .adapter import Family
from .blocks import one_stream, width_sizes
from .layout import IMAGE, OTHER, TEXT, Layout, LayoutError, ragged
from .samples import normal, times

MULTIPLE = 32


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    latents, texts = given["x"], given["cap_feats"]
    if isinstance(latents[0], list) or len({x.shape for x in latents}) > 1:
        raise LayoutError(
            "Z-Image is hooked with one image a row, all of one size: call it once for each size."
        )
    patch, frame = given.get("patch_size", 2), given.get("f_patch_size", 1)
    frames, rows, columns = (
        latents[0].shape[1] // frame,
        latents[0].shape[2] // patch,
        latents[0].shape[3] // patch,
    )
    image, lengths = rows * columns * frames, [len(text) for text in texts]
    spans = [
        [(IMAGE, image), (OTHER, -image % MULTIPLE), (TEXT, n), (OTHER, -n % MULTIPLE)]
        for n in lengths
    ]
    positions = torch.arange(max(lengths), device=texts[0].device)
    return ragged((rows, columns, frames), torch.stack([positions < n for n in lengths]), spans)


def inputs(transformer: Any) -> dict[str, Any]:
    config, patch = transformer.config, transformer.config.all_patch_size[0]
    latents = normal(
        transformer,
        2,
        config.in_channels,
        transformer.config.all_f_patch_size[0],
        2 * patch,
        3 * patch,
    )
    text = normal(transformer, 2, 40, config.cap_feat_dim)
    sizes = {"patch_size": patch, "f_patch_size": config.all_f_patch_size[0]}
    return {
        "x": list(latents),
        "t": times(transformer),
        "cap_feats": [text[0], text[1, :5]],
    } | sizes


def small() -> Any:
    size = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    return ZImageTransformer2DModel(
        in_channels=4, cap_feat_dim=12, axes_dims=[4, 6, 6], axes_lens=[128, 64, 64], **size
    )


FAMILY = Family(
    name="Z-Image",
    transformer="ZImageTransformer2DModel",
    blocks=(
        one_stream(
            "layers", "attention", attn_out="attention_norm2", mlp_out="ffn_norm2", enters="x"
        ),
    ),
    layout=layout,
    inputs=inputs,
    small=small,
    sizes=width_sizes("n_heads", "dim"),
    image="x",
    text="cap_feats",
    cond_first=True,
    notes="positions are [image, text, padding of both]; outputs pass a norm, then a tanh gate",
)
