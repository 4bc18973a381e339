"""Generation, hooks, caches, heat maps and sweeps of random models as wide as PixArt-Σ-XL and
FLUX.1, in one run.

`python -m benchmarks.wide` prints seconds of a condition, and its ratio to the plain diffusers
pipeline on the same noise. The images of both sides are compared. A sweep zeroes single heads at
single steps; its ratio is that of a cell to one call of the plain pipeline, and its bound the share
of the denoiser calls that a cell cannot take from the run without intervention.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro

from dit_lens import Intervention, sweep
from dit_lens.readout.heat_maps import heatmap
from hooked_models import HookedTextToImage

from .measuring import agree, ratio, record, turns
from .pipelines import flux_blocks, xl_blocks

PLAIN, INERT, Z, MAP = (
    "plain pipeline",
    "hooked, nothing attached",
    "cache z of all steps",
    "heat map of a word",
)


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    models: tuple[Literal["pixart", "flux"], ...] = ("pixart", "flux")
    layers: int = 2
    """Blocks of PixArt, and of each kind of FLUX."""
    heads: int = 0
    """0 for the heads of the real models: 16 of PixArt, 24 of FLUX."""
    side: int = 32
    """Side of the latents: 256 image positions."""
    text_tokens: int = 64
    steps: int = 4
    cells: int = 16
    """Cells of each sweep."""
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    rows = [row for name in config.models for row in compared(config, name)]
    record("wide", config, pd.DataFrame(rows), config.out)


def compared(config: Config, name: str) -> list[dict[str, Any]]:
    """Measure one model: a row for each condition."""
    if name == "pixart":
        width = {"width": 64 * config.heads} if config.heads else {}
        pipe, prompt = xl_blocks(config.layers, config.side, config.text_tokens, **width)
        call = {"use_resolution_binning": False, "clean_caption": False}
        shape, options = (1, 4, config.side, config.side), {"guidance": 4.5}
    else:
        pipe, prompt = flux_blocks(
            config.layers,
            config.layers,
            config.text_tokens,
            **({"heads": config.heads} if config.heads else {}),
        )
        pixels = {"height": 8 * config.side, "width": 8 * config.side}
        call, options = pixels, {}
        shape = (1, (config.side // 2) ** 2, 64)
    dtype = getattr(torch, config.dtype)
    pipe = pipe.to(config.device, dtype)
    model = HookedTextToImage.from_pipeline(pipe)
    if name == "flux":
        model.options = {**pixels, "max_sequence_length": config.text_tokens}
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        config.device, dtype
    )
    ours = {"num_steps": config.steps, "latents": latents, **options}
    plain = {
        "num_inference_steps": config.steps,
        "max_sequence_length": config.text_tokens,
        "output_type": "pt",
        **call,
    }
    sides: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: pipe([prompt], latents=latents.clone(), **plain).images,
        INERT: lambda: model([prompt], **ours),
        Z: lambda: model.run_with_cache(
            [prompt], names_filter=lambda full: full.endswith("hook_z"), **ours
        ),
        MAP: lambda: heatmap(model, prompt, "red", **ours),
    }
    times, values = turns(sides, config.repeats, config.device)
    worst = agree(
        "images", values[INERT], values[PLAIN], 1e-4 if config.dtype == "float32" else 5e-2
    )
    rows = [
        {
            "model": name,
            "condition": side,
            "seconds": statistics.median(times[side]),
            "ratio to plain": ratio(times, side, PLAIN),
            "bound": None,
            "difference": worst if side == INERT else None,
        }
        for side in sides
    ]
    return rows + swept(config, name, model, prompt, options, statistics.median(times[PLAIN]))


def swept(
    config: Config, name: str, model: Any, prompt: str, options: dict[str, Any], plain: float
) -> list[dict[str, Any]]:
    """Measure a one-step sweep and a sweep over images: a row each."""
    sublayer = "cross_attn" if name == "pixart" else "attn"
    heads = range(min(config.cells, int(model.cfg.n_heads)))
    steps = range(-(-config.cells // len(heads)))
    every = Intervention(f"blocks.*.{sublayer}.hook_z", branch="cond")
    cells = sweep.grid(every, layers=[0], heads=heads, steps=steps)
    rows = []
    for on in ("x0", "image"):
        metric = {
            "strength": sweep.Metric(lambda tensor: tensor.flatten(1).square().mean(dim=1), on=on)
        }

        def run(metric: Any = metric) -> Any:
            return sweep.run(model, [prompt], [0], cells, metric, num_steps=config.steps, **options)

        times, _ = turns({"sweep": run}, config.repeats, config.device)
        alone = statistics.median(times["sweep"]) / len(cells)
        calls = [1 if on == "x0" else config.steps - step for step in steps for _ in heads]
        bound = (sum(calls) + config.steps) / len(calls) / config.steps
        rows.append(
            {
                "model": name,
                "condition": f"sweep, {on}, a cell of {len(cells)}",
                "seconds": alone,
                "ratio to plain": alone / plain,
                "bound": bound,
                "difference": None,
            }
        )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config))
