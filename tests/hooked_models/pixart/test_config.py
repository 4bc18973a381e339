"""Configurations are read from diffusers; other architectures are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_models.pixart.dit import DiTConfig, HookedDiT

from ..tiny import tiny_transformer


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.1},
        {"activation_fn": "geglu"},
        {"norm_elementwise_affine": True},
        {"cross_attention_dim": None},
    ],
)
def test_other_architectures_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        HookedDiT(tiny_transformer(**option))


def test_config_is_read_from_diffusers() -> None:
    dit = HookedDiT(
        tiny_transformer(num_layers=1, attention_bias=False, sample_size=128, norm_eps=1e-5)
    )
    cfg = dit.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model, cfg.d_mlp) == (1, 3, 8, 24, 96)
    assert (cfg.n_ctx, cfg.d_text, cfg.in_channels, cfg.out_channels, cfg.patch_size) == (
        4096,
        10,
        4,
        8,
        2,
    )
    assert (cfg.sample_size, cfg.interpolation_scale, cfg.use_additional_conditions, cfg.eps) == (
        128,
        2.0,
        True,
        1e-5,
    )
    assert (cfg.device, cfg.dtype, cfg.use_attn_result, cfg.use_split_qkv_input) == (
        "cpu",
        torch.float32,
        False,
        False,
    )
    # TransformerLens would say cuda where there is one
    assert DiTConfig.from_transformer(dit.wrapped).device == "cpu"
    assert dit.config is dit.wrapped.config
    assert dit.device == dit.wrapped.device
    assert not any(module.training for module in dit.modules())
