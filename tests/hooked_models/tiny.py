"""Tiny random PixArt transformers, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from hooked_models.pixart.dit import HookedDiT


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


def set_flags(
    dit: HookedDiT,
    result: bool = False,
    split: bool = False,
    attn_in: bool = False,
    mlp_in: bool = False,
) -> None:
    """Every flag at once; the two forks exclude each other, so both go off first."""
    dit.set_use_split_qkv_input(False)
    dit.set_use_attn_in(False)
    dit.set_use_attn_result(result)
    dit.set_use_split_qkv_input(split)
    dit.set_use_attn_in(attn_in)
    dit.set_use_hook_mlp_in(mlp_in)


def with_state(dit: HookedDiT, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the text replaced by its state."""
    rest = {key: value for key, value in inputs.items() if not key.startswith("encoder_")}
    return {
        **rest,
        "text_state": dit.encode_text(
            inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        ),
    }


def shapes(n_layers: int, b: int, pos: int, text: int) -> dict[str, tuple[int, ...]]:
    """Every name of design.md's section "Names" within one denoiser call, with its shape, for the
    tiny transformer.
    """
    heads, d_head, d, d_text = 3, 8, 24, 10
    named: dict[str, tuple[int, ...]] = {
        "hook_embed": (b, pos, d),
        "hook_pos_embed": (b, pos, d),
        "hook_t_emb": (b, d),
        "hook_t_mod": (b, 6 * d),
        "hook_text": (b, text, d_text),
        "hook_caption": (b, text, d),
        "ln_final.hook_scale": (b, pos, 1),
        "ln_final.hook_normalized": (b, pos, d),
    }
    residual = (
        "resid_pre resid_mid resid_mid_cross resid_post attn_out cross_attn_out mlp_out "
        "attn_out_pre_gate mlp_out_pre_gate"
    )
    for layer in range(n_layers):
        block: dict[str, tuple[int, ...]] = {
            f"hook_{name}": (b, pos, d) for name in [*residual.split(), "mlp_in"]
        }
        block["hook_attn_in"] = block["hook_cross_attn_in"] = (b, pos, heads, d)
        for name in ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"):
            block[f"adaln.hook_{name}"] = (b, 1, d)
        for ln in ("ln1", "ln2"):
            block[f"{ln}.hook_scale"] = (b, pos, 1)
            block[f"{ln}.hook_normalized"] = (b, pos, d)
        for attn, keys in (("attn", pos), ("cross_attn", text)):
            for name, length in (("q", pos), ("k", keys), ("v", keys)):
                block[f"{attn}.hook_{name}"] = (b, length, heads, d_head)
                block[f"{attn}.hook_{name}_input"] = (b, length, heads, d)
            block[f"{attn}.hook_z"] = (b, pos, heads, d_head)
            block[f"{attn}.hook_result"] = (b, pos, heads, d)
            block[f"{attn}.hook_attn_scores"] = block[f"{attn}.hook_pattern"] = (
                b,
                heads,
                pos,
                keys,
            )
        block["mlp.hook_pre"] = block["mlp.hook_post"] = (b, pos, 4 * d)
        named |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return named


NAMES = sorted(shapes(2, 2, 16, 5))


GATED = [name for name in NAMES if name.endswith(("_result", "_input", "_in"))]


ways = pytest.mark.parametrize(
    "how",
    [
        *("hooks", "bwd_hooks", "run_with_hooks", "add_hook", "add_perma_hook"),
        *("add_caching_hooks", "run_with_cache", "tuple", "list", "set"),
    ],
)
