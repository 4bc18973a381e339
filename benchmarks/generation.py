"""What hooks cost: a generation with all hook points in place, against stock diffusers, in one run.

`python benchmarks/generation.py --model rte-micro` prints seconds a generation, and ratios to `PixArtSigmaPipeline.__call__`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import tyro
from diffusers import PixArtSigmaPipeline

from hooked_models import HookedTextToImage
from hooked_models.hub import resolve

PROMPT = "red circle is above blue square"


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    batch: tuple[int, ...] = (1, 8, 32)
    rounds: int = 7
    """Conditions take turns; the median of the rounds is reported."""
    threads: int = 1


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    pipe = PixArtSigmaPipeline.from_pretrained(resolve(config.model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = HookedTextToImage.from_pipeline(PixArtSigmaPipeline.from_pretrained(resolve(config.model), dtype=torch.float32))
    rows = []
    for batch in config.batch:
        prompts = [PROMPT] * batch
        shape = (batch, model.cfg.in_channels, model.cfg.sample_size, model.cfg.sample_size)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds = measure(conditions(pipe, model, prompts, latents), config.rounds)
        rows += [(batch, name, s, s / seconds["diffusers"]) for name, s in seconds.items()]
    table = pd.DataFrame(rows, columns=["batch", "condition", "seconds", "ratio to diffusers"])
    print(f"{config.model}, {config.threads} thread(s), median of {config.rounds} interleaved rounds")
    print(table.round(3).to_string(index=False))


def conditions(
    pipe: PixArtSigmaPipeline, model: HookedTextToImage, prompts: list[str], latents: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """What is compared; each call draws the same images from the same noise."""
    call = {"use_resolution_binning": False, "max_sequence_length": 20, "clean_caption": False, "output_type": "pt"}
    one_hook = [("steps.0.cond.blocks.0.cross_attn.hook_z", lambda tensor, hook: None)]

    def cached(ending: str) -> Callable[[], object]:
        return lambda: model.run_with_cache(prompts, latents=latents, names_filter=lambda name: name.endswith(ending))

    return {
        "diffusers": lambda: pipe(prompts, latents=latents.clone(), num_inference_steps=14, **call),
        "hooked, nothing attached": lambda: model(prompts, latents=latents),
        "one hook at one step": lambda: model.run_with_hooks(prompts, latents=latents, fwd_hooks=one_hook),
        "cache all cross-attention patterns": cached("cross_attn.hook_pattern"),
        "cache all residual streams": cached("hook_resid_post"),
    }


def measure(conditions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall-clock seconds of each condition; they take turns, so a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in conditions}
    for turn in range(rounds + 1):
        for name, run in conditions.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main(tyro.cli(Config))
