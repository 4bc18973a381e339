"""Ideogram 4: one stream, each row padding, its text, then its image.

Source: `Ideogram4Transformer2DModel`, `Ideogram4AttnProcessor` and `Ideogram4Pipeline` (diffusers
0.42). diffusers' latents and text are both as long as the stream; by row, latents are the image's
alone, and text is [row text_pos layer d] of the layers of its encoder, padding last. A transformer
of its own computes the unconditional branch, which has no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from torch import Tensor
from torch.nn.functional import pad

from ..hooks.streams import permute
from .adapter import Family
from .blocks import one_stream
from .layout import IMAGE, OTHER, TEXT, Layout, extent
from .samples import image_ids, normal, times

IMAGE_SIGN, TEXT_SIGN = OUTPUT_IMAGE_INDICATOR, LLM_TOKEN_INDICATOR
N_LAYERS = len(QWEN3_VL_ACTIVATION_LAYERS)
TEXT_ARGUMENT = "encoder_hidden_states"
GUIDANCE = 7.0
"""As in the pipeline's own schedule, all but its last three steps."""


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    signs, places = given["indicator"], given["position_ids"]
    labels = (
        torch.full_like(signs, OTHER)
        .masked_fill(signs == IMAGE_SIGN, IMAGE)
        .masked_fill(signs == TEXT_SIGN, TEXT)
    )
    texts = (signs == TEXT_SIGN).sum(1, keepdim=True)
    mask = torch.arange(before(given), device=signs.device) < texts
    return Layout(extent(places[0][signs[0] == IMAGE_SIGN]), mask, {"joint": labels})


def _order(given: Mapping[str, Any]) -> Tensor:
    """Text positions of each row: those of its tokens, then padding."""
    signs = given["indicator"][:, : before(given)]
    return (signs != TEXT_SIGN).long().argsort(dim=1, stable=True)


def before(given: Mapping[str, Any]) -> int:
    return int((given["indicator"][0] != IMAGE_SIGN).sum())


def by_row(live: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    start = before(given)
    text = permute(given[TEXT_ARGUMENT][:, :start], _order(given), 1)
    layers = text.unflatten(-1, (-1, N_LAYERS)).transpose(2, 3)
    return {**given, "hidden_states": given["hidden_states"][:, start:], TEXT_ARGUMENT: layers}


def as_called(live: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    start, latents = before(rows), rows["hidden_states"]
    text = permute(rows[TEXT_ARGUMENT].transpose(2, 3).flatten(2), _order(rows).argsort(1), 1)
    whole = pad(text, (0, 0, 0, latents.shape[1]))
    return {**rows, "hidden_states": pad(latents, (0, 0, start, 0)), TEXT_ARGUMENT: whole}


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance is the same at all steps, unless the call has a schedule."""
    schedule = options.get("guidance_schedule")
    if schedule is None:
        scale = options.get("guidance_scale")
        guided = {"guidance_scale": GUIDANCE if scale is None else scale}
        return {**options, **guided, "guidance_schedule": None}
    return {**options, "guidance_schedule": tuple(map(float, schedule))}


def inputs(transformer: Any) -> dict[str, Any]:
    config, device = transformer.config, transformer.device
    signs = torch.tensor([[3] * 5 + [2] * 6, [0] * 2 + [3] * 3 + [2] * 6], device=device)
    places = torch.cat(
        [torch.arange(5, device=device)[:, None].expand(5, 3), image_ids(transformer, 3).long() + 8]
    )
    return {
        "hidden_states": normal(transformer, 2, 11, config.in_channels),
        "timestep": times(transformer),
        "encoder_hidden_states": normal(transformer, 2, 11, config.llm_features_dim),
        "position_ids": places.expand(2, 11, 3),
        "segment_ids": (signs > 0).long(),
        "indicator": signs,
    }


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
    }
    return Ideogram4Transformer2DModel(
        in_channels=4, llm_features_dim=2 * N_LAYERS, mrope_section=(4, 2, 2), **size
    )


FAMILY = Family(
    name="Ideogram 4",
    transformer="Ideogram4Transformer2DModel",
    blocks=(one_stream("layers", "attention", attn_out="attention_norm2", mlp_out="ffn_norm2"),),
    layout=layout,
    inputs=inputs,
    small=small,
    by_row=by_row,
    as_called=as_called,
    before=before,
    second="unconditional_transformer",
    layerwise=lambda encoder: (encoder.language_model.embed_tokens, encoder.language_model.layers),
    guidance=GUIDANCE,
    completed=completed,
    notes="positions are [image, text, padding]; outputs pass a norm, then a tanh gate",
)
