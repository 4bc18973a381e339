"""FLUX.2 (dev, klein): two streams in one attention, [text, image], then one-stream blocks.

Source: `Flux2Transformer2DModel`, `Flux2AttnProcessor` and `Flux2ParallelSelfAttnProcessor`
(diffusers 0.42). Single blocks have attention and MLP side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import Flux2Transformer2DModel
from torch import Tensor

from .adapter import Family
from .blocks import Attention, Blocks, Write, of_heads, two_streams
from .layout import ids, in_order
from .samples import packed, times


def inputs(transformer: Any) -> dict[str, Any]:
    guidance = {"guidance": 4 * times(transformer)} if transformer.config.guidance_embeds else {}
    return packed(transformer, 4) | guidance


def small() -> Any:
    size = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "timestep_guidance_channels": 16,
    }
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4), **size
    )


def part(index: int) -> Callable[[Any], Tensor]:
    """Queries, keys or values of the Linear that also holds the MLP's input."""
    return lambda block: block.attn.to_qkv_mlp_proj.weight[: 3 * block.attn.inner_dim].chunk(3)[
        index
    ]


WEIGHTS = {name: part(index) for index, name in enumerate("QKV")}
SINGLE = Blocks(
    "single_transformer_blocks",
    {"attn": Attention("attn", weights={**WEIGHTS, "O": of_heads("attn.to_out")})},
    {"hidden_states": "joint"},
    ("joint",),
    {"attn_mlp_out_pre_gate": Write("attn", ("joint",))},
)
FAMILY = Family(
    name="FLUX.2",
    transformer="Flux2Transformer2DModel",
    blocks=(two_streams("transformer_blocks"), SINGLE),
    layout=in_order("text", ids),
    inputs=inputs,
    small=small,
    notes="a single block's attn_mlp_out_pre_gate is what attention and MLP write together",
)
