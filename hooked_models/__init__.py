"""Text-to-image diffusion transformers as TransformerLens hooked models."""

from __future__ import annotations

# diffusers looks a third-party pipeline component's base class up on its package (pipeline_loading_utils.get_class_obj…)
from diffusers import ModelMixin
from transformers import PreTrainedModel

from .cache import CacheTooLargeError, GenerationCache
from .checks import ModelCheckError
from .codec import PatchCodec
from .dit import HookedDiT
from .dit_cache import DiTCache
from .fused_encoder import FusedTokenEncoder, FusedTokenEncoderConfig
from .hooked_module import NotFoldedError, UnknownHookError
from .hub import list_models
from .rte import HookedTokenEncoder, RandomTokenEncoder, RandomTokenEncoderConfig, word_tokenizer
from .t5 import HookedT5Encoder
from .text_to_image import HookedTextToImage
from .trajectory import Trajectory

__all__ = [
    "CacheTooLargeError",
    "DiTCache",
    "FusedTokenEncoder",
    "FusedTokenEncoderConfig",
    "GenerationCache",
    "HookedDiT",
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
