"""The codec is an exact PCA with AutoencoderKL's manners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from sklearn.decomposition import PCA

from dit_lens import scenes
from hooked_models import (
    PatchCodec,
)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return scenes.render(scenes.sample(600, seed=1)) * 2 - 1


def test_codec_reconstructs_like_scikit_learns_pca(images):
    codec = PatchCodec.fit(images[:300], latent_channels=6)
    # one patch of 8 × 8 in torch.unfold's order
    patches = (
        torch.nn.functional.unfold(images[300:310], 8, stride=8)
        .transpose(1, 2)
        .flatten(0, 1)
        .double()
        .numpy()
    )
    train = (
        torch.nn.functional.unfold(images[:300], 8, stride=8)
        .transpose(1, 2)
        .flatten(0, 1)
        .double()
        .numpy()
    )
    pca = PCA(6, svd_solver="covariance_eigh").fit(train)
    expected = pca.inverse_transform(pca.transform(patches))
    ours = (
        torch.nn.functional.unfold(codec(images[300:310]), 8, stride=8)
        .transpose(1, 2)
        .flatten(0, 1)
    )
    assert np.abs(ours.numpy() - expected).max() < 1e-4
    assert torch.allclose(
        codec.components.flatten(1) @ codec.components.flatten(1).T, torch.eye(6), atol=1e-5
    )


def test_with_all_components_the_codec_loses_nothing():
    noise = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = PatchCodec.fit(noise, latent_channels=48, patch_size=4)
    assert (codec(noise) - noise).abs().max() < 1e-4


def test_scaled_latents_have_the_deviation_asked_for(images):
    codec = PatchCodec.fit(images, latent_channels=24, latent_std=0.5)
    latents = codec.encode(images).latent_dist.mode() * codec.config.scaling_factor
    assert latents.shape == (600, 24, 16, 16)
    assert latents.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("channels", [24])
def test_the_round_trip_scores_like_the_ground_truth(images, channels):
    wanted = scenes.sample(600, seed=1)
    codec = PatchCodec.fit(scenes.render(scenes.sample(2000, seed=2)) * 2 - 1, channels)
    verdict = scenes.evaluate((codec(images) / 2 + 0.5).clamp(0, 1), wanted)
    for name in (
        "color",
        "shape",
        "unique_binding",
        "relation_strict",
        "relation_loose",
        "relation_given_both",
    ):
        assert float(verdict[name].mean()) >= 0.995, name


def test_codec_answers_every_call_that_a_pipeline_makes_of_autoencoder_kl(images):
    reference = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
                              up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    codec = PatchCodec.fit(images[:50])
    assert len(codec.config.block_out_channels) == len(reference.config.block_out_channels)
    for vae in (reference, codec):
        posterior = vae.encode(images[:2], return_dict=False)[0]
        assert type(vae.encode(images[:2])).__name__ == "AutoencoderKLOutput"
        z = posterior.sample()
        assert z.shape[-2:] == posterior.mode().shape[-2:] == (16, 16)
        assert (
            vae.decode(z).sample.shape
            == vae.decode(z, return_dict=False)[0].shape
            == (2, 3, 128, 128)
        )
    assert torch.equal(
        codec.encode(images[:2]).latent_dist.sample(), codec.encode(images[:2]).latent_dist.mode()
    )
