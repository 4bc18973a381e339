"""Memory of reading attention at the token count of 1024 px: synopses and filtered caches against
plain sampling.

`python benchmarks/memory.py` draws one image of 4,096 tokens with PixArt-XL's heads (16 × 72) in a
few random layers. Each condition runs in a process of its own; memory is its peak resident size.
"added" leaves out the memory that the process held before the call (libraries, weights): the harder
comparison.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import psutil
import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from dit_lens import synopsis
from hooked_models import (
    HookedTextToImage,
    PatchCodec,
    RandomTokenEncoder,
    RandomTokenEncoderConfig,
    word_tokenizer,
)
from hooked_models.generation.cache_estimate import estimate

PROMPT = "red circle is above blue square"


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    layers: int = 2
    side: int = 128
    """Side of the latents; 128 is 1024 px, 4,096 tokens."""
    heads: int = 16
    d_head: int = 72
    steps: int = 2
    threads: int = 1
    only: str = ""
    """Conditions whose name has this in it, beside plain sampling."""


def build(config: Config) -> HookedTextToImage:
    """A random model; the codec is linear, because an autoencoder's memory would hide the
    denoiser's.
    """
    torch.manual_seed(0)
    width = config.heads * config.d_head
    transformer = PixArtTransformer2DModel(
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.d_head,
        cross_attention_dim=width,
        caption_channels=64,
        sample_size=config.side,
        out_channels=8,
        use_additional_conditions=False,
        interpolation_scale=2,
    )
    words = tuple(PROMPT.split())
    encoder = RandomTokenEncoder(RandomTokenEncoderConfig(words=words, d_model=64))
    codec = PatchCodec(latent_channels=4, patch_size=8)
    return HookedTextToImage(
        transformer, encoder, word_tokenizer(words), codec, DPMSolverMultistepScheduler()
    ).eval()


def conditions(model: HookedTextToImage, steps: int) -> dict[str, Callable[[], object]]:
    """The sides compared; each call draws the same image."""
    last = model.cfg.n_layers - 1
    two = {"num_steps": steps, "heads": [f"L{last}H0", f"L{last}H1"]}

    def pattern(sublayer: str) -> Callable[[str], bool]:
        return lambda name: name.endswith(f".{sublayer}.hook_pattern")

    def synopses(sublayer: synopsis.Sublayer) -> Callable[[], object]:
        return lambda: synopsis.attention_synopsis(
            model, PROMPT, sublayer=sublayer, num_steps=steps
        )

    def on_disk() -> object:
        with tempfile.TemporaryDirectory() as out:
            return model.run_with_cache(
                PROMPT,
                num_steps=steps,
                names_filter=lambda name: name.endswith("hook_resid_post"),
                out=out,
            )

    return {
        "plain sampling": lambda: model.trajectory(PROMPT, num_steps=steps),
        "synopsis, cross-attention": synopses("cross_attn"),
        "synopsis, self-attention": synopses("attn"),
        "cache, two heads' z and cross-attention patterns": lambda: model.run_with_cache(
            PROMPT,
            names_filter=lambda name: name.endswith(
                (".cross_attn.hook_pattern", ".cross_attn.hook_z")
            ),
            **two,
        ),
        "cache, entropy of all self-attention": lambda: model.run_with_cache(
            PROMPT, num_steps=steps, names_filter=pattern("attn"), patterns="entropy"
        ),
        "cache, attention received in all self-attention": lambda: model.run_with_cache(
            PROMPT, num_steps=steps, names_filter=pattern("attn"), patterns="received"
        ),
        "cache on disk, residual stream after each layer": on_disk,
        "cache, one head's self-attention pattern at one step": lambda: model.run_with_cache(
            PROMPT, num_steps=steps, names_filter=pattern("attn"), heads=f"L{last}H0", steps=0
        ),
    }


@torch.no_grad()
def peak(config: Config, condition: str) -> tuple[float, float]:
    """(MiB held before the call, MiB at the peak of this process)."""
    torch.set_num_threads(config.threads)
    run = conditions(build(config), config.steps)[condition]
    before = psutil.Process().memory_info().rss
    result = run()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    del result
    return before / 2**20, highest / 2**20


def main(config: Config) -> None:
    rows = []
    for name in conditions(build(config), config.steps):
        if config.only not in name and rows:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, highest = pool.apply(peak, (config, name))
        rows.append((name, highest, highest - before))
        print(f"{name}: {highest:.0f} MiB", flush=True)
    table = pd.DataFrame(rows, columns=["condition", "peak MiB", "added MiB"])
    table["peak ratio"] = table["peak MiB"] / table["peak MiB"].iloc[0]
    table["added ratio"] = table["added MiB"] / table["added MiB"].iloc[0]
    print(f"\n{config}\n{table.round(3).to_string(index=False)}")
    whole = estimate(
        build(config),
        PROMPT,
        config.steps,
        names_filter=lambda name: name.endswith(".attn.hook_pattern"),
    )
    print(f"\nAll self-attention patterns would be {whole}.")


if __name__ == "__main__":
    main(tyro.cli(Config))
