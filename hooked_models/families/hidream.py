"""HiDream: [image, text] in one attention; each block brings a text of its own along.

Source: `HiDreamImageTransformer2DModel` and `HiDreamAttnProcessor` (diffusers 0.42). The text of a
block is T5's, the last Llama layer's, and that of the block's own Llama layer: a prompt's tokens
stand in three places, and enter as three arguments here. Trap: latents that are not square are
padded to `max_resolution`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor

from .adapter import Family
from .blocks import one_stream, two_streams, weight
from .layout import Layout, ordered, patches
from .samples import normal, times

T5, LLAMA = "encoder_hidden_states_t5", "encoder_hidden_states_llama3"
LAST, OTHERS = f"{T5}_last_layer", f"{T5}_other_layers"
"""Text [row pos d] of the last block's Llama layer, and [row pos layer d] of all others."""


def by_row(live: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    rows, layers = dict(given), given[LLAMA].unbind()
    del rows[LLAMA]
    last = live.config.llama_layers[-1] % len(layers)
    others = [layer for number, layer in enumerate(layers) if number != last]
    return rows | {LAST: layers[last], OTHERS: torch.stack(others, dim=2)}


def as_called(live: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in rows.items() if name not in (LAST, OTHERS)}
    layers = list(rows[OTHERS].unbind(2))
    last = live.config.llama_layers[-1] % (len(layers) + 1)
    return given | {LLAMA: torch.stack([*layers[:last], rows[LAST], *layers[last:]])}


def turned(encoded: Any) -> Any:
    """Llama's text [layer row pos d] as [row layer pos d], and back."""
    return tuple(
        one.transpose(0, 1) if isinstance(one, Tensor) and one.ndim == 4 else one for one in encoded
    )


def sides(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Sides of as many pixels as the pipeline's default, in the proportion of the call's."""
    of, whole = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
    scale = math.sqrt(whole**2 / (width * height))
    return int(height * scale // of * of), int(width * scale // of * of)


@contextmanager
def experts_with_gradients(live: Any) -> Iterator[None]:
    """Let experts run as in training: their inference is without gradients."""
    experts: list[Any] = [one for one in live.modules() if isinstance(one, MOEFeedForwardSwiGLU)]
    before = [(one, one.training, one._force_inference_output) for one in experts]
    try:
        for one in experts:
            one.training, one._force_inference_output = True, False
        yield
    finally:
        for one, training, forced in before:
            one.training, one._force_inference_output = training, forced


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    t5, llama = given[T5], given[LLAMA]
    rows, columns, _ = grid = patches(live, given)
    text = torch.ones(len(t5), t5.shape[1] + 2 * llama.shape[2], dtype=torch.bool, device=t5.device)
    padding = 0 if rows == columns else live.max_seq - rows * columns
    return ordered(grid, text, "image", references=padding)


def inputs(transformer: Any) -> dict[str, Any]:
    config, side = transformer.config, 2 * transformer.config.patch_size
    return {
        "hidden_states": normal(transformer, 2, config.in_channels, side, side),
        "timesteps": times(transformer, 1000),
        T5: normal(transformer, 2, 5, config.caption_channels[0]),
        LLAMA: normal(transformer, max(config.llama_layers) + 1, 2, 5, config.caption_channels[1]),
        "pooled_embeds": normal(transformer, 2, config.text_emb_dim),
    }


def small() -> Any:
    size = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "patch_size": 2,
    }
    text = {
        "caption_channels": [12, 8],
        "text_emb_dim": 16,
        "llama_layers": (0, 1),
        "max_resolution": (8, 8),
    }
    more = {"num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2)}
    return HiDreamImageTransformer2DModel(in_channels=4, out_channels=4, **size, **text, **more)


OF_TEXT = {"Q_text": "to_q_t", "K_text": "to_k_t", "V_text": "to_v_t", "O_text": "to_out_t"}
WEIGHTS = {name: weight(f"block.attn1.{path}") for name, path in OF_TEXT.items()}
DOUBLE = two_streams(
    "double_stream_blocks",
    "block.attn1",
    "block.ff_i",
    "block.ff_t",
    ("image", "text"),
    weights=WEIGHTS,
)
FAMILY = Family(
    name="HiDream",
    transformer="HiDreamImageTransformer2DModel",
    blocks=(DOUBLE, one_stream("single_stream_blocks", "block.attn1", mlp_out="block.ff_i")),
    layout=layout,
    inputs=inputs,
    small=small,
    text=T5,
    by_row=by_row,
    as_called=as_called,
    kept=turned,
    handed=turned,
    sides=sides,
    differentiable=experts_with_gradients,
    notes=(
        "text positions are T5's, the last Llama layer's, and those of the block's own Llama layer"
    ),
)
