"""AuraFlow: eight registers, the text, then the image in one attention.

Source: `AuraFlowTransformer2DModel` and `AuraFlowAttnProcessor2_0` (diffusers 0.42). Trap: a block
adds its MLP's output to its own input; attention's output reaches the stream through the MLP
alone.
"""

from __future__ import annotations

from typing import Any

from diffusers import AuraFlowTransformer2DModel

from .adapter import Family
from .blocks import one_stream, two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.joint_attention_dim),
        "timestep": times(transformer),
    }


def small() -> Any:
    size = {
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    text = {"joint_attention_dim": 12, "caption_projection_dim": 32}
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=16,
        **size,
        **text,
    )


FAMILY = Family(
    name="AuraFlow",
    transformer="AuraFlowTransformer2DModel",
    blocks=(two_streams("joint_transformer_blocks"), one_stream("single_transformer_blocks")),
    layout=in_order("text", patches, registers=lambda live: live.register_tokens.shape[1]),
    inputs=inputs,
    small=small,
    notes=(
        "positions are [image, text, registers]; attn_out_pre_gate is not added to the stream "
        "itself"
    ),
)
