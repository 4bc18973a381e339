"""Parts of the small random inputs on which models are checked.

They are two rows of 2 × 3 image tokens, with texts of five tokens and of three.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def random(*shape: int) -> Float[Tensor, "..."]:
    """Normal numbers, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def normal(live: Any, *shape: int) -> Float[Tensor, "..."]:
    """Normal numbers, the same in every call, where and as a model's weights are."""
    return random(*shape).to(live.device, live.dtype)


def text_mask(live: Any) -> Bool[Tensor, "2 5"]:
    """Five tokens in row 0, three in row 1."""
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=live.device).bool()


def times(live: Any, top: int = 1) -> Float[Tensor, "2"]:
    """A time for each row, on a scale that ends at `top` (flow models: 1 or 1000)."""
    return torch.tensor([0.9, 0.2], device=live.device, dtype=live.dtype) * top


def image_ids(live: Any, n_axes: int) -> Float[Tensor, "6 {n_axes}"]:
    """Places of 2 × 3 image tokens: rows in axis 1, columns in axis 2."""
    places = torch.zeros(6, n_axes, device=live.device)
    places[:, 1], places[:, 2] = (
        torch.arange(6, device=live.device) // 3,
        torch.arange(6, device=live.device) % 3,
    )
    return places


def patch_pixels(live: Any, channels: int, frames: int = 0) -> Float[Tensor, "..."]:
    """Latents of 2 × 3 patches: [2 channel (frame) row column]."""
    patch = live.config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    return normal(live, 2, channels, *([frames] if frames else []), 2 * patch[0], 3 * patch[1])


def packed(live: Any, n_axes: int, top: int = 1) -> dict[str, Any]:
    """Inputs of the models that take packed latents and places on `n_axes`, as FLUX does."""
    return {
        "hidden_states": normal(live, 2, 6, live.config.in_channels),
        "encoder_hidden_states": normal(live, 2, 5, live.config.joint_attention_dim),
        "timestep": times(live, top),
        "img_ids": image_ids(live, n_axes),
        "txt_ids": torch.zeros(5, n_axes, device=live.device),
    }
