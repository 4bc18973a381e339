"""How sweeps scale: with rows in a batch, and with workers of one thread each.

`python -m benchmarks.scaling` prints milliseconds a row of one denoising step for batches of 1 to
512 rows, and cells a second of a Ray cluster of one and of two workers on this machine. The time
that a cluster takes to start (loading the model in every worker) is measured with a sweep of one head at
the last step, and taken off. Clusters are timed by the clock, not by processor seconds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from dit_lens import Intervention, sweep
from dit_lens.sweep.cost import seconds_of_step
from hooked_models import HookedTextToImage

from .measuring import record
from .sweep import PROMPTS, strength


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    workers: tuple[int, ...] = (1, 2)
    """() starts no cluster."""
    steps: int = 6
    """Steps of the cluster's sweep, over all heads: a cell of step s takes 14 − s denoising steps."""
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    plan = planned(model, range(config.steps))
    times: dict[int, list[float]] = {n: [] for n in config.rows}
    for _ in range(config.repeats):
        for n in config.rows:
            times[n].append(seconds_of_step(plan, n))
    rows = [{"rows": n, "ms a row": 1000 * statistics.median(times[n]) / n} for n in config.rows]
    cluster = [on_cluster(model, config, workers) for workers in config.workers]
    for one in cluster:
        one["× one worker"] = one["cells/s"] / cluster[0]["cells/s"]
    record("scaling", config, pd.DataFrame(rows), config.out, workers=cluster)


def planned(model: HookedTextToImage, steps: range) -> sweep.Plan:
    """All heads of cross-attention at some steps, and an effect on the image."""
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=layers, heads=heads, steps=steps
    )
    return sweep.plan(model, PROMPTS, 0, cells, {"m": sweep.Metric(strength)}, batch=32)


def on_cluster(model: HookedTextToImage, config: Config, workers: int) -> dict[str, float]:
    """A sweep by `workers` workers of one thread."""
    import ray

    spent = []
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        small = Intervention("blocks.0.cross_attn.hook_z", heads=[0], steps=13)
        start_up = sweep.plan(model, PROMPTS, 0, [small], {"m": sweep.Metric(strength)})
        # the first starts Ray itself
        for plan in (start_up, start_up, planned(model, range(config.steps))):
            start = time.perf_counter()
            plan.run(executor="ray", workers=workers)
            spent.append(time.perf_counter() - start)
    finally:
        ray.shutdown()
    _, starting, whole = spent
    return {
        "workers": workers,
        "seconds": whole,
        "of them starting": starting,
        "cells/s": plan.cells / (whole - starting),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
