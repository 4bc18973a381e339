"""PRX: an image stream whose queries read text and image together; the text never changes.

Source: `PRXTransformer2DModel` and `PRXAttnProcessor2_0` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PRXTransformer2DModel
from torch import Tensor

from .adapter import Family, random
from .blocks import Attention, Blocks, Write
from .layout import in_order, patches


def part(projection: str, index: int, n: int) -> Any:
    """One of `n` projections that a Linear holds side by side."""

    def weight(block: Any) -> Tensor:
        return getattr(block.attention, projection).weight.chunk(n)[index]

    return weight


def inputs(transformer: Any) -> dict[str, Any]:
    config, device, dtype, p = transformer.config, transformer.device, transformer.dtype, transformer.config.patch_size
    return {
        "hidden_states": random(2, config.in_channels, 2 * p, 3 * p).to(device, dtype),
        "timestep": torch.tensor([0.9, 0.2], device=device, dtype=dtype),
        "encoder_hidden_states": random(2, 5, config.context_in_dim).to(device, dtype),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device).bool(),
    }


def small() -> Any:
    size = {"hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    return PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=12, **size)


WEIGHTS = {name: part("img_qkv_proj", i, 3) for i, name in enumerate("QKV")}
WEIGHTS |= {f"{name}_text": part("txt_kv_proj", i, 2) for i, name in enumerate("KV")}
FAMILY = Family(
    name="PRX",
    transformer="PRXTransformer2DModel",
    blocks=(
        Blocks(
            "blocks",
            {"attn": Attention("attention", queries="image", weights=WEIGHTS)},
            {"hidden_states": "image"},
            ("image",),
            {"attn_out_pre_gate": Write("attention", ("image",)), "mlp_out_pre_gate": Write("down_proj", ("image",))},
        ),
    ),
    layout=in_order("text", patches, mask="attention_mask"),
    sizes=lambda live: (live.config.num_heads, live.config.hidden_size // live.config.num_heads, live.config.hidden_size),
    inputs=inputs,
    small=small,
    notes="queries are the image's alone, keys [image, text]",
)
