"""Text-to-image diffusion transformers as TransformerLens hooked models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_imports import attach, redirect

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    from .generation.cache import GenerationCache
    from .generation.cache_estimate import CacheTooLargeError
    from .generation.model import HookedTextToImage
    from .generation.pipeline import HookedPipeline
    from .generation.pixart import HookedPixArt
    from .generation.trajectory import Trajectory
    from .hooks.errors import NotFoldedError, UnknownHookError
    from .pipelines.checks import ModelCheckError
    from .pipelines.codec import PatchCodec
    from .pipelines.hub import list_models
    from .pixart.cache import DiTCache
    from .pixart.dit import HookedDiT
    from .text_encoders.fused_tokens import FusedTokenEncoder, FusedTokenEncoderConfig
    from .text_encoders.random_tokens import (
        HookedTokenEncoder,
        RandomTokenEncoder,
        RandomTokenEncoderConfig,
        word_tokenizer,
    )
    from .text_encoders.t5 import HookedT5Encoder

__all__ = [
    "CacheTooLargeError",
    "DiTCache",
    "FusedTokenEncoder",
    "FusedTokenEncoderConfig",
    "GenerationCache",
    "HookedDiT",
    "HookedPipeline",
    "HookedPixArt",
    "HookedT5Encoder",
    "HookedTextToImage",
    "HookedTokenEncoder",
    "ModelCheckError",
    "ModelMixin",
    "NotFoldedError",
    "PatchCodec",
    "PreTrainedModel",
    "RandomTokenEncoder",
    "RandomTokenEncoderConfig",
    "Trajectory",
    "UnknownHookError",
    "list_models",
    "word_tokenizer",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        # diffusers gets a third-party component's base class from its package
        # (pipeline_loading_utils.get_class_obj…)
        "ModelMixin": "/diffusers:ModelMixin",
        "PreTrainedModel": "/transformers:PreTrainedModel",
        "PatchCodec": "pipelines.codec:PatchCodec",
        "CacheTooLargeError": "generation.cache_estimate:CacheTooLargeError",
        "GenerationCache": "generation.cache:GenerationCache",
        "HookedTextToImage": "generation.model:HookedTextToImage",
        "HookedPixArt": "generation.pixart:HookedPixArt",
        "HookedPipeline": "generation.pipeline:HookedPipeline",
        "Trajectory": "generation.trajectory:Trajectory",
        "NotFoldedError": "hooks:NotFoldedError",
        "UnknownHookError": "hooks:UnknownHookError",
        "ModelCheckError": "pipelines.checks:ModelCheckError",
        "list_models": "pipelines.hub:list_models",
        "DiTCache": "pixart.cache:DiTCache",
        "HookedDiT": "pixart.dit:HookedDiT",
        "FusedTokenEncoder": "text_encoders.fused_tokens:FusedTokenEncoder",
        "FusedTokenEncoderConfig": "text_encoders.fused_tokens:FusedTokenEncoderConfig",
        "HookedTokenEncoder": "text_encoders.random_tokens:HookedTokenEncoder",
        "RandomTokenEncoder": "text_encoders.random_tokens:RandomTokenEncoder",
        "RandomTokenEncoderConfig": "text_encoders.random_tokens:RandomTokenEncoderConfig",
        "word_tokenizer": "text_encoders.random_tokens:word_tokenizer",
        "HookedT5Encoder": "text_encoders.t5:HookedT5Encoder",
    },
)

redirect(
    __name__,
    {
        "attention": "pixart.attention",
        "block": "pixart.block",
        "cache": "generation.cache",
        "cache_folder": "generation.cache_store",
        "checks": "pipelines.checks",
        "codec": "pipelines.codec",
        "config": "pixart.config",
        "digest": "store.hashing",
        "dit": "pixart.dit",
        "dit_cache": "pixart.cache",
        "fast": "pixart.fast",
        "fast.empty_prompts": "pixart.fast.empty_prompts",
        "fast.enter_at_layers": "pixart.fast.enter_at_layers",
        "folding": "pixart.folding",
        "fused_encoder": "text_encoders.fused_tokens",
        "generation_hooks": "generation.hooks",
        "hooked_module": "hooks.module",
        "hub": "pipelines.hub",
        "loading": "pipelines.loading",
        "names": "generation.names",
        "patch_model": "pixart.patch_model",
        "pipeline_model": "pipelines.pipeline_model",
        "recording": "generation.capture",
        "resolution": "pipelines.resolution",
        "rte": "text_encoders.random_tokens",
        "sampling": "generation.sampling",
        "t5": "text_encoders.t5",
        "text_to_image": "generation.model",
        "trajectory": "generation.trajectory",
        "views": "generation.views",
    },
)
