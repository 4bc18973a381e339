"""What a synopsis costs: time and peak memory, against plain sampling and against caching all patterns, in one run.

`python benchmarks/synopsis.py --model rte-micro` prints seconds a generation, the memory that it adds, and ratios. Memory
is the peak resident size of a process of its own, less what it held before the measured call.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import psutil
import torch
import tyro

from dit_lens import scenes, synopsis
from hooked_models import HookedTextToImage


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    batch: tuple[int, ...] = (1, 8, 32)
    rounds: int = 5
    """Conditions take turns; the median of the rounds is reported."""
    threads: int = 1


def conditions(model: HookedTextToImage, n: int) -> dict[str, Callable[[], object]]:
    """What is compared; each call draws the same images."""
    wanted = scenes.sample(n, seed=0, color_words="both")
    prompts = [scenes.caption(scene) for scene in wanted]
    groups = synopsis.image_groups_from_scenes(wanted, threshold=0.3)

    def measured(sublayer: synopsis.Sublayer, reduce: synopsis.Reduce) -> Callable[[], object]:
        return lambda: synopsis.attention_synopsis(model, prompts, 0, sublayer, groups, reduce, batch_size=n)

    def cached(sublayer: str) -> Callable[[], object]:
        name = f"{sublayer}.hook_pattern"
        return lambda: model.run_with_cache(prompts, names_filter=lambda full: full.endswith(f".{name}"), branch="both")

    return {
        "plain sampling": lambda: model.trajectory(prompts),
        "synopsis, cross-attention, sum": measured("cross_attn", "sum"),
        "synopsis, cross-attention, max": measured("cross_attn", "max"),
        "all cross-attention patterns cached": cached("cross_attn"),
        "synopsis, self-attention, sum": measured("attn", "sum"),
        "all self-attention patterns cached": cached("attn"),
    }


@torch.no_grad()
def added_memory(config: Config, batch: int, condition: str) -> float:
    """MiB that a call adds to the peak of this process; a small generation has loaded everything before."""
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model)
    conditions(model, 1)[condition]()
    run = conditions(model, batch)[condition]
    before = psutil.Process().memory_info().rss
    result = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    del result
    return (peak - before) / 2**20


@torch.no_grad()
def seconds(config: Config, model: HookedTextToImage, batch: int) -> dict[str, float]:
    """Median processor seconds of each condition; they take turns, so a slow moment of the machine hits all of them."""
    runs = conditions(model, batch)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(config.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first turn warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model)
    rows = []
    for batch in config.batch:
        took = seconds(config, model, batch)
        for name, spent in took.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory = pool.apply(added_memory, (config, batch, name))
            rows.append((batch, name, spent, spent / took["plain sampling"], memory))
    table = pd.DataFrame(rows, columns=["batch", "condition", "seconds", "ratio to plain", "MiB added"])
    table["memory ratio"] = table["MiB added"] / table.groupby("batch")["MiB added"].transform("first")
    print(f"{config.model}, {config.threads} thread(s), median of {config.rounds} interleaved rounds")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(Config))
