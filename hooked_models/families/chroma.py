"""Chroma: FLUX.1 without a pooled text; the mask covers [text, image].

Source: `ChromaTransformer2DModel` and `FluxAttnProcessor` (diffusers 0.42). Trap: a padded query
may look at no key; it gets zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel

from .adapter import Family
from .blocks import parallel_streams, two_streams
from .layout import Layout, ids, in_order
from .samples import packed, text_mask


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    mask, n_text = given.get("attention_mask"), given["encoder_hidden_states"].shape[1]
    of_text = None if mask is None else mask[:, :n_text]
    return in_order("text", ids, mask="of_text")(live, {**given, "of_text": of_text})


def inputs(transformer: Any) -> dict[str, Any]:
    mask = F.pad(text_mask(transformer), (0, 6), value=True)
    return packed(transformer, 3) | {"attention_mask": mask}


def small() -> Any:
    size = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 4, 8),
    }
    approximator = {
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return ChromaTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=12, **size, **approximator
    )


FAMILY = Family(
    name="Chroma",
    transformer="ChromaTransformer2DModel",
    blocks=(
        two_streams("transformer_blocks"),
        parallel_streams("single_transformer_blocks", joined=True),
    ),
    layout=layout,
    inputs=inputs,
    small=small,
    notes=(
        "single blocks come last; their attn_mlp_out_pre_gate is what attention and MLP write "
        "together"
    ),
)
