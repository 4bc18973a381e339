"""FLUX.3: blocks of the image alone, then blocks of both streams; attention and MLP side by side.

Source: `Flux3Transformer2DModel` and `Flux3AttnProcessor` (diffusers 0.42). Blocks of the text
alone, which run before, have no names here.
"""

from __future__ import annotations

from typing import Any

from diffusers import Flux3Transformer2DModel

from .adapter import Family
from .blocks import Attention, Blocks, Write
from .flux3_pipeline import Flux3Pipeline
from .layout import ids, in_order
from .samples import packed, times


def inputs(transformer: Any) -> dict[str, Any]:
    target = {"target_timestep": times(transformer) - 0.1} if transformer.config.flow_map else {}
    return packed(transformer, 4) | target


def small() -> Any:
    size = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "timestep_channels": 16,
    }
    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        **size,
    )


IMAGE_BLOCKS = Blocks(
    "mode_blocks.image",
    {"image_attn": Attention("attn", "image", "image")},
    {"hidden_states": "image"},
    ("image",),
    {
        "image_attn_out_pre_gate": Write("attn", ("image",)),
        "mlp_out_pre_gate": Write("ff", ("image",)),
    },
)
JOINT_BLOCKS = Blocks(
    "single_transformer_blocks",
    {"attn": Attention("attn")},
    {"hidden_states": "image", "encoder_hidden_states": "text"},
    ("text", "image"),
    {"attn_out_pre_gate": Write("attn", ("joint",)), "mlp_out_pre_gate": Write("ff", ("joint",))},
)
FAMILY = Family(
    name="FLUX.3",
    transformer="Flux3Transformer2DModel",
    blocks=(IMAGE_BLOCKS, JOINT_BLOCKS),
    layout=in_order("text", ids),
    inputs=inputs,
    small=small,
    notes="layers count the image's own blocks first, which have image_attn",
    modular=Flux3Pipeline,
)
