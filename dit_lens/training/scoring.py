"""Draw scenes from captions with a stock diffusers pipeline, and let the evaluator judge them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import xarray as xr
from diffusers import PixArtSigmaPipeline

from .. import scenes
from ..scenes import Scene
from ..stats import Interval, clustered_mean

METRICS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose", "relation_given_both")


@torch.no_grad()
def score(
    pipe: PixArtSigmaPipeline,
    wanted: Sequence[Scene],
    seeds: Sequence[int] = (0,),
    num_steps: int = 14,
    guidance: float = 4.5,
    batch_size: int = 64,
) -> xr.Dataset:
    """Judge one image for each scene and seed: `scenes.evaluate`'s variables over dims (scene, seed).

    A seed gives every prompt the same noise (one fresh CPU generator an image), so that conditions can be compared in pairs.
    """
    jobs = [(scene, seed) for scene in wanted for seed in seeds]
    latent_shape = (pipe.transformer.config.in_channels, *(pipe.transformer.config.sample_size,) * 2)
    images = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        noise = [torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]
        images.append(
            pipe(
                [scenes.caption(scene) for scene, _ in batch],
                latents=torch.stack(noise).to(pipe.device, pipe.transformer.dtype),
                num_inference_steps=num_steps,
                guidance_scale=guidance,
                use_resolution_binning=False,
                max_sequence_length=20,
                clean_caption=False,
                output_type="pt",
            ).images.float().cpu()
        )  # fmt: skip
    verdict = scenes.evaluate(torch.cat(images), [scene for scene, _ in jobs])
    shape = (len(wanted), len(seeds))
    variables = {
        name: (("scene", "seed"), variable.values.reshape(shape))
        for name, variable in verdict.data_vars.items()
        if variable.dims == ("image",)
    }
    return xr.Dataset(variables, coords={"seed": list(seeds), "relation": ("scene", [s.relation for s in wanted])})


def summarise(verdict: xr.Dataset) -> pd.DataFrame:
    """One row a metric: mean, low and high end of the 95 % interval. Scenes are resampled whole."""
    rows = {name: clustered_mean(verdict[name].transpose("scene", "seed").values.astype(float)) for name in METRICS}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(Interval._fields)).rename_axis("metric")
