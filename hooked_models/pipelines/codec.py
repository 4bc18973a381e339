"""An exact linear image codec with AutoencoderKL's interface: PCA of image patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor, nn


class PatchCodec(ModelMixin, ConfigMixin):
    """Encode every `patch_size`² patch as its leading principal components, and decode it.

    There are `latent_channels` of them. Stands where an `AutoencoderKL` stands in a diffusers
    pipeline: images in [−1, 1], `encode(x).latent_dist` and `decode(z).sample`, and the pipeline
    multiplies latents by `config.scaling_factor`. The components are orthonormal, so a squared
    error in latents is the squared error in pixels, and decoding costs one small matrix product.

    Example:
        >>> images = scenes.render(scenes.sample(100, seed=0)) * 2 - 1
        >>> codec = PatchCodec.fit(images, latent_channels=24)
        >>> codec.encode(images).latent_dist.mode().shape
        torch.Size([100, 24, 16, 16])
        >>> bool((codec(images) - images).abs().mean() < 0.02)
        True
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 24,
        patch_size: int = 8,
        scaling_factor: float = 1.0,
        # only its length is read, by pipelines: log2(patch_size) + 1
        block_out_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if block_out_channels is None:
            self.register_to_config(
                block_out_channels=(latent_channels,) * (int(math.log2(patch_size)) + 1)
            )
        self.mean = nn.Buffer(torch.zeros(3, patch_size, patch_size))
        self.components = nn.Buffer(torch.zeros(latent_channels, 3, patch_size, patch_size))
        self.explained_variance = nn.Buffer(torch.zeros(latent_channels))

    @classmethod
    def fit(
        cls,
        images: Float[Tensor, "image 3 height width"],
        latent_channels: int = 24,
        patch_size: int = 8,
        latent_std: float = 0.5,
    ) -> PatchCodec:
        """Fit to images in [−1, 1].

        `scaling_factor` is set so that scaled latents have standard deviation `latent_std`.

        `latent_std` fixes at which noise level an image's layout is decided. Objects cover a tenth
        of a scene, so at unit deviation they stand out of the noise until the path's last few per
        cent, where a 14-step sampler hardly steps.
        """
        patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
        pca = PCA(latent_channels, svd_solver="covariance_eigh").fit(patches.double().numpy())
        deviation = float(np.sqrt(pca.explained_variance_.sum() / latent_channels))
        codec = cls(latent_channels, patch_size, scaling_factor=latent_std / deviation)
        codec.mean.copy_(torch.from_numpy(pca.mean_).view_as(codec.mean))
        codec.components.copy_(torch.from_numpy(pca.components_).view_as(codec.components))
        codec.explained_variance.copy_(torch.from_numpy(pca.explained_variance_ratio_))
        return codec

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode images in [−1, 1] as a distribution without spread around latents.

        They are [batch channel height/patch width/patch].
        """
        offset = torch.einsum("cijk,ijk->c", self.components, self.mean)
        latents = F.conv2d(x, self.components, -offset, stride=self.config.patch_size)
        # log-variance −∞ is clamped to e⁻³⁰
        moments = torch.cat([latents, torch.full_like(latents, -torch.inf)], dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Float[Tensor, "batch channel rows columns"],
        return_dict: bool = True,
        generator: object = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents to images around [−1, 1], not clamped.

        `generator` is AutoencoderKL's, and has no effect.
        """
        images = F.conv_transpose2d(z, self.components, stride=self.config.patch_size)
        images = images + self.mean.repeat(1, z.shape[-2], z.shape[-1])
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Encode and decode images in [−1, 1]."""
        return self.decode(self.encode(sample, return_dict=False)[0].mode(), return_dict=False)[0]


# Checkpoints name the class by package (model_index.json), so the file may move without breaking
# them.
PatchCodec.__module__ = "hooked_models"
