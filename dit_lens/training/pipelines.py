"""Untrained pipelines: a size and a text encoder become a folder that plain diffusers can open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from hooked_models import (
    FusedTokenEncoder,
    FusedTokenEncoderConfig,
    PatchCodec,
    RandomTokenEncoder,
    RandomTokenEncoderConfig,
    word_tokenizer,
)
from hooked_models.pipelines.hub import ZOO, fetch
from hooked_models.pipelines.loading import load_whole, open_pipeline

from .. import task as scenes
from ..task.protocol import Task, TwoObjects


@dataclass(frozen=True)
class Size:
    """Depth, width and heads of a DiT.

    The sizes and their names are the paper's (arXiv 2601.06338, model table).
    """

    layers: int
    width: int
    heads: int


PRESETS = {
    "nano": Size(3, 192, 3),
    "micro": Size(6, 192, 3),
    "mini": Size(6, 384, 6),
    "B": Size(12, 768, 12),
}

LATENT_CHANNELS, LATENT_SIDE = 24, 16
CODEC_SCENES = 4000
RELATION_WORDS = tuple(
    sorted(
        {
            word
            for phrases in scenes.PHRASES.values()
            for phrase in phrases
            for word in phrase.split()
        }
    )
)
"""Every word of the 22 phrases, "to", "the" and "of" included: the words that "fused" moves."""


def build_pipeline(
    size: Size,
    encoder: str = "rte",
    objective: Literal["x0", "epsilon"] = "x0",
    seed: int = 0,
    moved_share: float = 1.0,
    task: Task | None = None,
) -> PixArtSigmaPipeline:
    """An untrained pipeline for a task's images: 16 × 16 latents, patches of 2, so 64 image tokens.

    Args:
        size: width, depth and number of heads of the denoiser.
        encoder: "rte", "fused", a folder, …: see `build_text_encoder`.
        objective: prediction that the scheduler is configured for.
        seed: seed of the random weights.
        moved_share: see `build_text_encoder`.
        task: its words are the vocabulary of "rte", and its images fit the codec; two objects by
            default.

    Raises:
        ValueError: the task's images are no multiple of 16 pixels.
    """
    task = task or TwoObjects()
    if task.image_size % LATENT_SIDE:
        raise ValueError(
            f"Images of {task.image_size} pixels do not divide into {LATENT_SIDE} × {LATENT_SIDE} "
            "latents."
        )
    text_encoder, tokenizer = build_text_encoder(encoder, moved_share, task.words)
    drawn = task.render(task.sample(CODEC_SCENES, seed=0))
    codec = PatchCodec.fit(drawn * 2 - 1, LATENT_CHANNELS, task.image_size // LATENT_SIDE)
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_layers=size.layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        cross_attention_dim=size.width,
        caption_channels=text_encoder.config.d_model,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        sample_size=LATENT_SIDE,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    # as PixArt: a block starts by not listening to the text
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    scheduler = (
        DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
        if objective == "x0"
        else DPMSolverMultistepScheduler()
    )
    return PixArtSigmaPipeline(tokenizer, text_encoder, codec, transformer, scheduler)


def build_text_encoder(
    encoder: str, moved_share: float = 1.0, words: Sequence[str] = scenes.WORDS
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Text encoder and tokenizer.

    "rte", "rte-nopos", "fused", "t5-scenes", or the folder or hub id of a T5. "fused" is "rte" with
    the share `moved_share` of every relation word's vector in the second shape word instead of in
    its place (`FusedTokenEncoder`): at 1 the relation words hold nothing but their places, at 0 it
    is "rte". A folder may hold both side by side, the tokenizer in `tokenizer/`, or be a pipeline's
    (`text_encoder/`, `tokenizer/`). Folders are read in float32, hub ids (T5-XXL:
    "google/t5-v1_1-xxl", 9 GB) in bfloat16: float16 gives T5 wrong embeddings.

    Raises:
        FileNotFoundError: `encoder` is none of these.
        ValueError: it names no T5, or it is "fused" and the words are not those of the two-object
            task.
    """
    if encoder in ("rte", "rte-nopos"):
        config = RandomTokenEncoderConfig(words=words, d_model=256, positions=encoder == "rte")
        return RandomTokenEncoder(config).eval(), word_tokenizer(words)
    if encoder == "fused":
        if words != scenes.WORDS:
            raise ValueError(
                "The encoder 'fused' knows the words of the two-object task only: choose 'rte' or "
                "a T5."
            )
        fused = FusedTokenEncoderConfig(
            words=scenes.WORDS, moved=RELATION_WORDS, share=moved_share, d_model=256
        )
        return FusedTokenEncoder(fused).eval(), word_tokenizer(scenes.WORDS)
    folder = ZOO / encoder if (ZOO / encoder).is_dir() else Path(encoder)
    if not folder.is_dir() and (encoder.count("/") != 1 or encoder.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"There is no text encoder {encoder!r}: give 'rte', 'rte-nopos', 'fused', 't5-scenes', "
            "a folder with a T5 encoder "
            "and its tokenizer, or a hub id such as 'google/t5-v1_1-xxl'."
        )
    model_at = (
        folder / "text_encoder"
        if (folder / "text_encoder").is_dir()
        else folder
        if folder.is_dir()
        else encoder
    )
    tokenizer_at = folder / "tokenizer" if (folder / "tokenizer").is_dir() else model_at
    model_type = PreTrainedConfig.get_config_dict(model_at)[0].get("model_type")
    if model_type != "t5":
        raise ValueError(
            f"The text encoder in {encoder} is a {model_type!r}; training reads a T5 encoder, "
            "'rte', 'rte-nopos' or 'fused'."
        )
    precision = torch.float32 if folder.is_dir() else torch.bfloat16
    loaded = load_whole(T5EncoderModel, model_at, f"The text encoder in {encoder}", dtype=precision)
    return loaded.eval(), AutoTokenizer.from_pretrained(tokenizer_at)


def load_pipeline(name: str) -> PixArtSigmaPipeline:
    """A bundled model by name, or a pipeline folder, in float32.

    Raises ValueError if its index names foreign code.
    """
    return open_pipeline(fetch(name))
