"""Random pipelines of the sizes that benchmarks ask about."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from hooked_models import PatchCodec, RandomTokenEncoder, RandomTokenEncoderConfig, word_tokenizer

WORDS = ("red", "blue", "circle", "square", "is", "above", "left", "of")


def transformer(width: int, layers: int, side: int, text_width: int) -> PixArtTransformer2DModel:
    """Random weights; heads of 72 channels, as PixArt-XL's, where the width allows, of 64 otherwise. `side`: of the latents."""
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


def xl_blocks(layers: int, side: int, text_tokens: int) -> tuple[PixArtSigmaPipeline, str]:
    """A pipeline with blocks as wide as PixArt-Σ-XL's and text of T5-XXL's width; and a prompt that is so many tokens long."""
    tokenizer = word_tokenizer(WORDS, max_length=text_tokens)
    encoder = RandomTokenEncoder(RandomTokenEncoderConfig(words=WORDS, d_model=4096, positions=False)).eval()
    codec = PatchCodec(latent_channels=4, patch_size=8)
    pipe = PixArtSigmaPipeline(tokenizer, encoder, codec, transformer(1152, layers, side, 4096), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, " ".join(WORDS[i % len(WORDS)] for i in range(text_tokens - 1))
