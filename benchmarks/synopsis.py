"""Cost of a synopsis: time and peak memory, against plain sampling and against keeping all
patterns, in one run.

`python -m benchmarks.synopsis --model rte-micro` prints seconds a generation, the memory that it
adds, and ratios. Memory is the peak resident size of a process of its own, less its size before
the measured call. The paper's scripts keep explicit maps; attention-map-diffusers
(1.0.0) has no PixArt or other DiT with cross-attention among its pipelines, so there is nothing of
it to run here. The synopsis is compared with sums of the kept patterns.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import tyro

from dit_lens import scenes, synopsis
from dit_lens.text.prompts import role_mask
from hooked_models import HookedTextToImage

from .measuring import agree, ratio, record, turns

PLAIN, SUMMED, KEPT = (
    "plain sampling",
    "synopsis, cross-attention, sum",
    "all cross-attention patterns kept",
)


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    batch: tuple[int, ...] = (1, 8)
    steps: int = 14
    repeats: int = 3
    """Conditions take turns; the median is reported."""
    memory: bool = True
    """Measure the memory that each condition adds, in a process of its own."""
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


def conditions(
    model: HookedTextToImage, n: int, steps: int = 14
) -> dict[str, Callable[[], object]]:
    """The sides compared; each call draws the same images."""
    wanted = scenes.sample(n, seed=0, color_words="both")
    prompts = [scenes.caption(scene) for scene in wanted]
    groups = synopsis.image_groups_from_scenes(wanted, threshold=0.3)

    def measured(sublayer: synopsis.Sublayer, reduce: synopsis.Reduce) -> Callable[[], object]:
        return lambda: synopsis.attention_synopsis(
            model, prompts, 0, sublayer, groups, reduce, batch_size=n, num_steps=steps
        )

    def cached(sublayer: str) -> Callable[[], object]:
        name = f"{sublayer}.hook_pattern"
        return lambda: model.run_with_cache(
            prompts,
            num_steps=steps,
            names_filter=lambda full: full.endswith(f".{name}"),
            branch="both",
        )

    return {
        PLAIN: lambda: model.trajectory(prompts, num_steps=steps),
        SUMMED: measured("cross_attn", "sum"),
        "synopsis, cross-attention, max": measured("cross_attn", "max"),
        KEPT: cached("cross_attn"),
        "synopsis, self-attention, sum": measured("attn", "sum"),
        "all self-attention patterns kept": cached("attn"),
    }


@torch.no_grad()
def added_memory(config: Config, batch: int, condition: str) -> float:
    """MiB that a call adds to the peak of this process; a small generation has loaded everything
    before.
    """
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model)
    conditions(model, 1, config.steps)[condition]()
    run = conditions(model, batch, config.steps)[condition]
    before = psutil.Process().memory_info().rss
    result = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    del result
    return (peak - before) / 2**20


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    rows = []
    for batch in config.batch:
        times, values = turns(conditions(model, batch, config.steps), config.repeats, config.device)
        difference = checked(values, model)
        for name, spent in times.items():
            memory = None
            if config.memory:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    memory = pool.apply(added_memory, (config, batch, name))
            rows.append((batch, name, statistics.median(spent), ratio(times, name, PLAIN), memory))
    table = pd.DataFrame(
        rows, columns=["batch", "condition", "seconds", "ratio to plain", "MiB added"]
    )
    if config.memory:
        table["memory ratio"] = table["MiB added"] / table.groupby("batch")["MiB added"].transform(
            "first"
        )
    record("synopsis", config, table, config.out, difference=difference)


def checked(values: dict[str, Any], model: HookedTextToImage) -> float:
    """Attention of the whole image to relation words, in the synopsis and in the kept patterns."""
    seen = (
        values[SUMMED]
        .sel(branch="cond", text_group="relation")
        .sum("image_group")
        .transpose("step", "layer", "prompt", "head")
    )
    _, cache = values[KEPT]
    words = role_mask(model, seen["prompt"].values.tolist(), "relation").float()
    kept = [
        torch.einsum(
            "phqk,pk->ph", cache[f"steps.{step}.cond.blocks.{layer}.cross_attn.hook_pattern"], words
        )
        for step in seen["step"].values
        for layer in range(model.cfg.n_layers)
    ]
    return agree(
        "attention", torch.from_numpy(seen.values).flatten(), torch.stack(kept).flatten(), 1e-3
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
