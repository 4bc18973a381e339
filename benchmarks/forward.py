"""Cost of inert hooks: one denoiser call of `HookedDiT` against the diffusers model that it
wraps, in one run.

`python -m benchmarks.forward` prints milliseconds and ratios at the bundled models' width and at
PixArt-Σ-XL's. Both sides are given the same arguments, so both project the text, and both outputs
are compared.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro

from hooked_models import HookedDiT

from .measuring import agree, ratio, record, turns
from .pipelines import transformer


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    widths: tuple[int, ...] = (192, 1152)
    layers: int = 6
    side: int = 16
    """Side of the latents: 64 image tokens."""
    text_tokens: int = 20
    batch: int = 2
    repeats: int = 15
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    rows = []
    for width in config.widths:
        theirs = transformer(width, config.layers, config.side, width).to(
            config.device, getattr(torch, config.dtype)
        )
        ours = HookedDiT(theirs)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(config.batch, 4, config.side, config.side, generator=generator).to(
            theirs.device, theirs.dtype
        )
        text = torch.randn(config.batch, config.text_tokens, width, generator=generator).to(latents)
        call = {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(text.shape[:2], device=latents.device),
            "timestep": torch.full((config.batch,), 500, device=latents.device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        sides = {
            name: partial(first, model, latents, call)
            for name, model in (("diffusers", theirs), ("hooked", ours))
        }
        times, values = turns(sides, config.repeats, config.device)
        worst = agree(
            "the output",
            values["hooked"],
            values["diffusers"],
            1e-4 if config.dtype == "float32" else 2e-2,
        )
        shown = {f"{side} ms": 1000 * statistics.median(spent) for side, spent in times.items()}
        rows.append(
            {
                "width": width,
                **shown,
                "ratio": ratio(times, "hooked", "diffusers"),
                "difference": worst,
            }
        )
    record("forward", config, pd.DataFrame(rows), config.out)


def first(model: torch.nn.Module, latents: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """Prediction of a model."""
    return model(latents, **call)[0]


if __name__ == "__main__":
    main(tyro.cli(Config))
