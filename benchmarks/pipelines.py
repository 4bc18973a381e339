"""Random pipelines of the sizes that the benchmarks measure."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from hooked_models import PatchCodec, RandomTokenEncoder, RandomTokenEncoderConfig, word_tokenizer

WORDS = ("red", "blue", "circle", "square", "is", "above", "left", "of")


def transformer(width: int, layers: int, side: int, text_width: int) -> PixArtTransformer2DModel:
    """Random weights; heads of 72 channels, as PixArt-XL's, where the width allows, of 64
    otherwise. `side`: of the latents.
    """
    torch.manual_seed(0)
    d_head = 72 if width % 72 == 0 and width > 1000 else 64
    return PixArtTransformer2DModel(
        num_layers=layers,
        num_attention_heads=width // d_head,
        attention_head_dim=d_head,
        cross_attention_dim=width,
        caption_channels=text_width,
        in_channels=4,
        out_channels=8,
        sample_size=side,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    ).eval()


def xl_blocks(
    layers: int, side: int, text_tokens: int, width: int = 1152
) -> tuple[PixArtSigmaPipeline, str]:
    """A pipeline with blocks as wide as PixArt-Σ-XL's and text of T5-XXL's width; and a prompt of
    `text_tokens` tokens.
    """
    tokenizer = word_tokenizer(WORDS, max_length=text_tokens)
    encoder = RandomTokenEncoder(
        RandomTokenEncoderConfig(words=WORDS, d_model=4096, positions=False)
    ).eval()
    codec = PatchCodec(latent_channels=4, patch_size=8)
    pipe = PixArtSigmaPipeline(
        tokenizer,
        encoder,
        codec,
        transformer(width, layers, side, 4096),
        DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, " ".join(WORDS[i % len(WORDS)] for i in range(text_tokens - 1))


def small_vae(levels: int = 2, **config: Any) -> AutoencoderKL:
    """A random autoencoder of 4 channels, 2 ** (levels - 1) pixels to a latent."""
    sizes = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1, **config}
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **sizes,
    ).eval()


def flow_parts(
    text_tokens: int, clips: list[type[CLIPTextModel | CLIPTextModelWithProjection]], layers: int
) -> tuple[list[Any], str]:
    """A scheduler, a decoder of 16 latent channels, text encoders of the widths of FLUX.1 and SD3,
    each followed by its tokenizer; and a prompt of `text_tokens` tokens.

    Args:
        layers: of the CLIPs.
    """
    tokenizer = word_tokenizer(WORDS, max_length=text_tokens)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=64,
        projection_dim=768,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=text_tokens,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=4096, d_kv=8, d_ff=64, num_layers=1, num_heads=1
    )
    convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    parts = [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        small_vae(4, latent_channels=16, shift_factor=0.1, **convolutions),
    ]
    for encoder in (*(kind(clip) for kind in clips), T5EncoderModel(t5)):
        parts += [encoder.eval(), tokenizer]
    return parts, " ".join(WORDS[i % len(WORDS)] for i in range(text_tokens - 1))


def flux_blocks(
    double: int, single: int, text_tokens: int, heads: int = 24
) -> tuple[FluxPipeline, str]:
    """A FLUX.1 pipeline with blocks as wide as FLUX.1-dev's at 24 heads; and a prompt of
    `text_tokens` tokens.

    Args:
        double, single: numbers of blocks of either kind.
    """
    torch.manual_seed(0)
    parts, prompt = flow_parts(text_tokens, [CLIPTextModel], layers=1)
    denoiser = FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, num_attention_heads=heads, guidance_embeds=True
    )
    pipe = FluxPipeline(*parts, denoiser.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompt


def sd3_blocks(
    layers: int, text_tokens: int, heads: int = 24
) -> tuple[StableDiffusion3Pipeline, str]:
    """A pipeline with blocks as wide as SD3-medium's at 24 heads; and a prompt of `text_tokens`
    tokens, which the CLIPs and T5 have as many positions for.
    """
    torch.manual_seed(0)
    parts, prompt = flow_parts(text_tokens, [CLIPTextModelWithProjection] * 2, layers=2)
    denoiser = SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=1536,
    )
    pipe = StableDiffusion3Pipeline(denoiser.eval(), *parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompt
