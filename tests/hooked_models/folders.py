"""Small pipeline folders in the layouts and with the classes that PixArt checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from transformers import T5Config, T5EncoderModel

from benchmarks.pipelines import small_vae
from hooked_models import word_tokenizer

from .pipelines import WORDS, randomise
from .tiny import tiny_transformer

# transformer/config.json of PixArt-Sigma-XL-2-512-MS, class name included, without
# num_attention_heads and num_layers
XL = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_additional_conditions": False,
    "use_linear_projection": False,
}
OF_LEGACY_ALONE = (
    "double_self_attention",
    "num_vector_embeds",
    "only_cross_attention",
    "use_linear_projection",
)


def write_folder(
    folder: Path,
    pipeline: str = "sigma",
    *,
    legacy: bool = False,
    saved: dict[str, Any] | None = None,
    vae_levels: int = 2,
    **transformer: Any,
) -> Path:
    """A random pipeline: T5, AutoencoderKL, and a transformer of a few hundred image tokens at
    most.

    Args:
        legacy: name the transformer's class, and list its settings, as the checkpoints of 2024 do.
        saved: arguments of `save_pretrained`.
        transformer: its settings, in place of `tiny_transformer`'s.
    """
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = 512  # T5's own
    sizes = {
        "d_model": 10,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()
    randomise(encoder, 0.3)
    vae = small_vae(vae_levels, sample_size=16, scaling_factor=5.0)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.15)  # so that images saturate nowhere
    settings = {
        "num_attention_heads": 2,
        "use_additional_conditions": False,
        "patch_size": 4,
        "sample_size": 16,
        **transformer,
    }
    network = tiny_transformer(
        **{name: value for name, value in settings.items() if name not in OF_LEGACY_ALONE}
    )
    cls = PixArtAlphaPipeline if pipeline == "alpha" else PixArtSigmaPipeline
    pipe = cls(tokenizer, encoder, vae, network, DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder, **(saved or {}))
    if legacy:
        edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        edit_json(folder / "transformer/config.json", _class_name="Transformer2DModel", **settings)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
