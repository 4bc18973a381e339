"""Text-to-image diffusion transformers as TransformerLens hooked models."""

from __future__ import annotations

# diffusers looks a third-party pipeline component's base class up on its package (pipeline_loading_utils.get_class_obj…)
from diffusers import ModelMixin
from transformers import PreTrainedModel

from .cache import CacheTooLargeError, DiTCache, GenerationCache
from .codec import PatchCodec
from .dit import HookedDiT
from .hooked_module import UnknownHookError
from .hub import list_models
from .rte import HookedTokenEncoder, RandomTokenEncoder, RandomTokenEncoderConfig, word_tokenizer
from .text_to_image import HookedTextToImage
from .trajectory import Trajectory

__all__ = [
    "CacheTooLargeError",
    "DiTCache",
    "GenerationCache",
    "HookedDiT",
    "HookedTextToImage",
    "HookedTokenEncoder",
    "ModelMixin",
    "PatchCodec",
    "PreTrainedModel",
    "RandomTokenEncoder",
    "RandomTokenEncoderConfig",
    "Trajectory",
    "UnknownHookError",
    "list_models",
    "word_tokenizer",
]
