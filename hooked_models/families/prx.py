"""PRX: an image stream whose queries read text and image together; the text never changes.

Source: `PRXTransformer2DModel` and `PRXAttnProcessor2_0` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import PRXTransformer2DModel

from .adapter import Family
from .blocks import Attention, Blocks, Write, weight, width_sizes
from .layout import in_order, patches
from .samples import normal, patch_pixels, text_mask, times


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "timestep": times(transformer),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.context_in_dim),
        "attention_mask": text_mask(transformer),
    }


def small() -> Any:
    size = {"hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    return PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=12, **size)


WEIGHTS = {name: weight("attention.img_qkv_proj", i, 3) for i, name in enumerate("QKV")}
WEIGHTS |= {f"{name}_text": weight("attention.txt_kv_proj", i, 2) for i, name in enumerate("KV")}
FAMILY = Family(
    name="PRX",
    transformer="PRXTransformer2DModel",
    blocks=(
        Blocks(
            "blocks",
            {"attn": Attention("attention", queries="image", weights=WEIGHTS)},
            {"hidden_states": "image"},
            ("image",),
            {
                "attn_out_pre_gate": Write("attention", ("image",)),
                "mlp_out_pre_gate": Write("down_proj", ("image",)),
            },
        ),
    ),
    layout=in_order("text", patches, mask="attention_mask"),
    sizes=width_sizes("num_heads", "hidden_size"),
    inputs=inputs,
    small=small,
    notes="queries are the image's alone, keys [image, text]",
)
