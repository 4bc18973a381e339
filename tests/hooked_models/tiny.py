"""Tiny random PixArt transformers, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel


def tiny_transformer(seed: int = 0, **config: Any) -> PixArtTransformer2DModel:
    """A transformer in which every parameter matters: biases and tables are random too, and none is
    zero.
    """
    heads, d_head = config.get("num_attention_heads", 3), config.get("attention_head_dim", 8)
    defaults = {
        "num_attention_heads": heads,
        "attention_head_dim": d_head,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": heads * d_head,
        "caption_channels": 10,
        "sample_size": 8,
        "patch_size": 2,
    }
    transformer = PixArtTransformer2DModel(**{**defaults, **config}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_weight = parameter.ndim > 1 and not name.endswith("scale_shift_table")
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if is_weight else noise / 2)
    return transformer


def tiny_inputs(
    transformer: PixArtTransformer2DModel,
    *,
    height: int = 8,
    width: int = 8,
    text_len: int = 5,
    pads: int = 0,
    batch: int = 2,
    seed: int = 1,
) -> dict[str, Any]:
    """The keyword arguments with which PixArtSigmaPipeline calls its transformer, with random
    values.

    Row b masks its last ``pads + b`` text tokens, if ``pads`` is not 0; without pads there is no
    mask.
    """
    config, dtype = transformer.config, transformer.dtype
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    mask = None
    if pads:
        lengths = text_len - pads - torch.arange(batch)
        mask = (torch.arange(text_len) < lengths[:, None]).long()
    sizes = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        sizes = {
            "resolution": 500 + 100 * randn(batch, 2),
            "aspect_ratio": 1 + randn(batch, 1).abs(),
        }
    return {
        "hidden_states": randn(batch, config.in_channels, height, width),
        "encoder_hidden_states": randn(
            batch, text_len, config.caption_channels or config.cross_attention_dim
        ),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([901, 17, 500])[:batch],
        "added_cond_kwargs": sizes,
    }


def look(tensor: torch.Tensor, hook: Any) -> None:
    """A hook that changes nothing, but makes its HookPoint watched."""
