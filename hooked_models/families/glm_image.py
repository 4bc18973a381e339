"""GLM-Image: two streams in one attention, [text, image], with one MLP for both.

Source: `GlmImageTransformer2DModel` and `GlmImageAttnProcessor` (diffusers 0.42). A language model
draws image tokens first, here for each row alone, as the pipeline does for one prompt; in a batch,
the pipeline draws those of all rows from the first row's generator. The text is that in the
prompt's quotation marks, which is to be written in the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from .adapter import Family
from .blocks import two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    size = normal(transformer, 2, 2).abs() + 8
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.text_embed_dim),
        "prior_token_id": torch.arange(12, device=transformer.device).reshape(2, 6),
        "prior_token_drop": torch.zeros(2, dtype=torch.bool, device=transformer.device),
        "timestep": times(transformer, 1000),
        "target_size": size,
        "crop_coords": 0 * size,
    }


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=12,
        prior_vq_quantizer_codebook_size=16,
        **size,
    )


def drawn(
    pipe: Any, options: Mapping[str, Any], prompt: str, seed: int | None
) -> dict[str, Tensor]:
    """Image tokens [1 token], four for each of the language model's, which are 32 pixels wide."""
    height, width = options.get("height"), options.get("width")
    if not height or not width:
        raise ValueError(
            "GLM-Image has no size of its own: give height= and width=, multiples of 32, or set "
            "them in model.options."
        )
    if seed is None:
        tokens = torch.zeros(1, 4 * (height // 32) * (width // 32), dtype=torch.long)
        return {"prior_token_ids": tokens.to(pipe.transformer.device)}
    with torch.no_grad(), torch.random.fork_rng():
        generator = torch.Generator().manual_seed(seed)
        tokens, *_ = pipe.generate_prior_tokens([prompt], height, width, generator=generator)
    return {"prior_token_ids": tokens}


FAMILY = Family(
    name="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    blocks=(two_streams("transformer_blocks", "attn1", text_mlp="ff", leaves=("image", "text")),),
    layout=in_order("text", patches, mask="attention_mask"),
    inputs=inputs,
    small=small,
    notes="one MLP serves both streams: mlp_out is its first call, text_mlp_out its second",
    drawn=drawn,
)
