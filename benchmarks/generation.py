"""Cost of hooks: a generation with all hook points in place, against stock diffusers, in one run.

`python -m benchmarks.generation` prints seconds a generation, and ratios to
`PixArtSigmaPipeline.__call__`, for a bundled model and for blocks as wide as PixArt-Σ-XL's that
read a prompt of 300 tokens. Images of both sides are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from diffusers import PixArtSigmaPipeline

from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import resolve

from .measuring import agree, ratio, record, turns
from .pipelines import xl_blocks

PROMPT = "red circle is above blue square"
PEER, OURS = "diffusers", "hooked, nothing attached"


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    batch: tuple[int, ...] = (1, 8)
    steps: int = 14
    xl_layers: int = 2
    """Blocks of XL's width; 0 leaves this row out."""
    xl_side: int = 32
    """Side of its latents: 256 image tokens."""
    xl_steps: int = 4
    text_tokens: int = 300
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    dtype = getattr(torch, config.dtype)
    pipe = PixArtSigmaPipeline.from_pretrained(resolve(config.model), dtype=dtype).to(config.device)
    pipe.set_progress_bar_config(disable=True)
    rows = [
        row
        for n in config.batch
        for row in compared(config, config.model, pipe, [PROMPT] * n, config.steps, 20, True)
    ]
    if config.xl_layers:
        wide, prompt = xl_blocks(config.xl_layers, config.xl_side, config.text_tokens)
        wide = wide.to(config.device, dtype)
        name = f"{config.xl_layers} XL blocks, {config.text_tokens} text tokens"
        rows += compared(config, name, wide, [prompt], config.xl_steps, config.text_tokens, False)
    record("generation", config, pd.DataFrame(rows), config.out)


def compared(
    config: Config,
    name: str,
    pipe: PixArtSigmaPipeline,
    prompts: list[str],
    steps: int,
    length: int,
    also_caches: bool,
) -> list[dict[str, object]]:
    """A row for each condition."""
    model = HookedTextToImage.from_pipeline(pipe)
    shape = (len(prompts), model.cfg.in_channels, model.cfg.sample_size, model.cfg.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        model.device, model.dit.dtype
    )
    sides = conditions(pipe, model, prompts, latents, steps, length)
    if not also_caches:
        sides = {side: sides[side] for side in (PEER, OURS)}
    times, values = turns(sides, config.repeats, config.device)
    worst = agree(
        "images", values[OURS], values[PEER].images, 1e-4 if config.dtype == "float32" else 5e-2
    )
    return [
        {
            "model": name,
            "batch": len(prompts),
            "condition": side,
            "seconds": statistics.median(times[side]),
            "ratio to diffusers": ratio(times, side, PEER),
            "difference": worst if side == OURS else None,
        }
        for side in sides
    ]


def conditions(
    pipe: PixArtSigmaPipeline,
    model: HookedTextToImage,
    prompts: list[str],
    latents: torch.Tensor,
    steps: int,
    length: int,
) -> dict[str, Callable[[], object]]:
    """The sides compared; each call draws the same images from the same noise."""
    call = {
        "use_resolution_binning": False,
        "max_sequence_length": length,
        "clean_caption": False,
        "output_type": "pt",
    }
    one_hook = [("steps.0.cond.blocks.0.cross_attn.hook_z", lambda tensor, hook: None)]

    def cached(ending: str) -> Callable[[], object]:
        return lambda: model.run_with_cache(
            prompts,
            num_steps=steps,
            latents=latents,
            names_filter=lambda name: name.endswith(ending),
        )

    return {
        PEER: lambda: pipe(prompts, latents=latents.clone(), num_inference_steps=steps, **call),
        OURS: lambda: model(prompts, num_steps=steps, latents=latents),
        "one hook at one step": lambda: model.run_with_hooks(
            prompts, num_steps=steps, latents=latents, fwd_hooks=one_hook
        ),
        "cache all cross-attention patterns": cached("cross_attn.hook_pattern"),
        "cache all residual streams": cached("hook_resid_post"),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
