"""A tiny random pipeline whose every parameter, 1-D ones included, is random: an equality test on
zeros proves nothing.
"""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    UniPCMultistepScheduler,
)
from transformers import T5Config, T5EncoderModel

from hooked_models import PatchCodec, RandomTokenEncoder, RandomTokenEncoderConfig, word_tokenizer

WORDS = ("red", "blue", "circle", "square", "is", "above", "left", "of")
PROMPTS = ("red circle is above blue square", "blue square is left of red circle")
CALL = {
    "use_resolution_binning": False,
    "max_sequence_length": 20,
    "clean_caption": False,
    "output_type": "pt",
}
SCHEDULERS = {
    "flow": DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
    "epsilon": DPMSolverMultistepScheduler(),
    "third order": DPMSolverMultistepScheduler(solver_order=3),
    "unipc": UniPCMultistepScheduler(),
    "ddim": DDIMScheduler(),
    "euler": EulerDiscreteScheduler(),
}
"""Schedulers that draw no noise of their own."""


def noise(seed: int = 3, batch: int = 2, grid: int = 4) -> torch.Tensor:
    """Latents for a tiny pipeline, [batch channel height width]."""
    return torch.randn(batch, 4, grid, grid, generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module, scale: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if not tensor.is_floating_point():
                continue
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator).to(tensor))


def tiny_pipeline(
    text: str = "rte",
    learned_sigma: bool = False,
    dtype: torch.dtype = torch.float32,
    scheduler: object = None,
    grid: int = 4,
) -> PixArtSigmaPipeline:
    torch.manual_seed(1)
    tokenizer = word_tokenizer(WORDS)
    if text == "t5":
        sizes = {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        }
        encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
    else:
        encoder = RandomTokenEncoder(
            RandomTokenEncoderConfig(words=WORDS, d_model=16, positions=text == "rte")
        )
    codec = PatchCodec(latent_channels=4, patch_size=4, scaling_factor=0.7)
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        in_channels=4,
        out_channels=8 if learned_sigma else 4,
        sample_size=grid,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    randomise(codec, 0.1)
    randomise(transformer, 0.2)
    if scheduler is None:  # some schedulers have a length, and it may fail
        scheduler = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
    pipe = PixArtSigmaPipeline(tokenizer, encoder.eval(), codec, transformer.eval(), scheduler).to(
        dtype
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
