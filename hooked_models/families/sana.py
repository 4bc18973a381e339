"""SANA: linear attention within the image, softmax attention to the text.

Source: `SanaTransformer2DModel`, `SanaLinearAttnProcessor2_0` and `SanaAttnProcessor2_0` (diffusers
0.42); arXiv 2410.10629.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import SanaTransformer2DModel
from torch import Tensor

from .adapter import Family
from .blocks import Write, cross_attending
from .circuits import OWN_NORMS
from .layout import in_order, patches
from .samples import normal, patch_pixels, text_mask, times

CROSS = cross_attending("transformer_blocks", attn=None, mlp="", gated=())
LINEAR: dict[str, Write] = {
    "attn_out_pre_gate": Write("attn1", ("image",)),
    "mlp_out_pre_gate": Write("ff", ("image",), axes="batch d row column"),
}
BLOCKS = replace(CROSS, writes={**LINEAR, **CROSS.writes})


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.caption_channels),
        "encoder_attention_mask": text_mask(transformer).long(),
        "timestep": times(transformer, 1000),
    }


def small() -> Any:
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
    }
    text = {"cross_attention_dim": 16, "caption_channels": 12}
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, sample_size=3, patch_size=1, **text, **sizes
    )


def position(live: Any) -> Tensor | None:
    code = live.patch_embed.pos_embed
    return None if code is None else code[0]


FAMILY = Family(
    name="SANA",
    transformer="SanaTransformer2DModel",
    blocks=(BLOCKS,),
    layout=in_order("image", patches, mask="encoder_attention_mask"),
    sizes=lambda live: (
        live.config.num_cross_attention_heads,
        live.config.cross_attention_head_dim,
        live.config.num_attention_heads * live.config.attention_head_dim,
    ),
    inputs=inputs,
    small=small,
    mixers=("attn1", "ff"),
    nonlinear=lambda live: "" if live.config.qk_norm is None else OWN_NORMS,
    position=position,
    caption=lambda live, text: live.caption_norm(live.caption_projection(text)),
    no_pattern={
        "attn": (
            "SANA's attention within the image is linear (ReLU kernels, no softmax), so there is "
            "no pattern to see."
        )
    },
    notes="the MLP is a gated convolution, which mixes neighbouring positions",
)
