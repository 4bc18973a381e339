"""Base of denoisers over patches: patches in, position codes, patches out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..hooks.module import HookedModule, LanguageToolGuard, has_hooks
from ..hooks.wrapping import Wrapped
from .config import DiTConfig

# within a patch the channel is the fastest axis
PIXELS, PATCHES = "b c (h p) (w q)", "b (h w) (p q c)"


def writable(constant: Tensor, hooked: bool) -> Tensor:
    """Copy an input or buffer, so that a hook may write into it.

    Make it a leaf that requires grad if `hooked` in a graph.
    """
    if hooked and torch.is_grad_enabled() and not constant.requires_grad:
        constant = constant.detach().requires_grad_()
    return constant.clone()


class PatchModel(LanguageToolGuard, HookedModule):
    """A hooked transformer over patches, around a live module with fixed position codes."""

    blocks: Any
    """ModuleList of the blocks."""

    wrapped: Any
    """The diffusers module; not registered as a child, because its leaves are, once each."""

    wrapping: Wrapped
    """Refuses, at each call, a wrapped module with changes that this one would ignore."""

    patch_embed: Any
    hook_embed: HookPoint
    hook_pos_embed: HookPoint
    _cfg: DiTConfig
    setup: Any

    # Attributes that pipelines and TransformerLens read; taken from the live weights, which may
    # move.

    @property
    def cfg(self) -> DiTConfig:
        """Sizes and flags, with the current device and dtype."""
        self._cfg.device, self._cfg.dtype = str(self.device), self.dtype
        return self._cfg

    @property
    def config(self) -> Any:
        """The wrapped module's diffusers config."""
        return self.wrapped.config

    @property
    def device(self) -> torch.device:
        """Device of the patch embedding."""
        return self.patch_embed.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the patch embedding's weights."""
        return self.patch_embed.proj.weight.dtype

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The fixed position code of the training size, rows first.

        Its first half of channels holds x, the second y.
        """
        return self.patch_embed.pos_embed[0]

    def embed(
        self, latents: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Patches plus position codes, added in the code's precision, as diffusers does."""
        grid = self.patch_embed.proj(latents)  # [batch d_model rows columns]
        rows, columns = grid.shape[-2:]
        # Contiguous, because every residual sum inherits this layout and a Linear is slower on any
        # other.
        patches = self.hook_embed(grid.flatten(2).transpose(1, 2).contiguous())
        code = self.patch_embed.pos_embed
        if (rows, columns) != (self.patch_embed.height, self.patch_embed.width):
            base, scale = self.patch_embed.base_size, self._cfg.interpolation_scale
            code = get_2d_sincos_pos_embed(
                self._cfg.d_model,
                (rows, columns),
                base_size=base,
                interpolation_scale=scale,
                device=latents.device,
            ).float()[None]
        # Copied for each row: a hook that edits one row in place must not reach the others, or the
        # buffer.
        in_graph = latents.requires_grad or next(self.parameters()).requires_grad
        code = self.hook_pos_embed(
            writable(
                code.repeat(latents.shape[0], 1, 1), in_graph and has_hooks(self.hook_pos_embed)
            )
        )
        return (patches + code).to(patches.dtype)

    def from_patches(
        self, patches: Float[Tensor, "batch pos d_vocab"], like: Float[Tensor, "_ _ height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Assemble the output of ``proj_out`` into an image of the size of ``like``."""
        p = self._cfg.patch_size
        return rearrange(patches, f"{PATCHES} -> {PIXELS}", h=like.shape[-2] // p, p=p, q=p)

    def patches(
        self, output: Float[Tensor, "batch out_channels height width"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Cut an output into its patches, position by position: the inverse of ``from_patches``."""
        p = self._cfg.patch_size
        return rearrange(output, f"{PIXELS} -> {PATCHES}", p=p, q=p)

    # diffusers' ModelMixin: calls on weights and configuration go to the wrapped module, whose
    # weights these are

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the wrapped module, as diffusers does; `from_pretrained` of its class opens it."""
        self.wrapped.save_pretrained(folder, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Note entries in the wrapped module's config; sizes are read at wrapping alone."""
        self.wrapped.register_to_config(**kwargs)

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: attention reads weights past the hooks that cast them."""
        raise NotImplementedError(
            f"{type(self).__name__} reads its weights directly, so a layer cannot cast them as it "
            "runs: load the model with dtype=torch.bfloat16 instead."
        )

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: hooks would fire again when a block is recomputed."""
        raise NotImplementedError(
            f"{type(self).__name__} has no gradient checkpointing, under which hooks fire twice: "
            "train the wrapped module (model.wrapped.enable_gradient_checkpointing()), or "
            "differentiate with dit_lens.attribution."
        )
