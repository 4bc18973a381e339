"""Cost and accuracy of attribution over a whole generation, against exact patching and a plain
autograd loop, in one run.

`python -m benchmarks.attribution` prints, for 3, 7 and 14 steps: seconds in plain generations (two
are the runs compared), the memory that a call adds, and the rank correlation with exact patching of
a random sample. The peer is attribution patching as its papers write it: one forward pass with all
activations in autograd's graph, one backward pass (EAP-IG's own loop with one integration point).
Both sides score the same heads and are compared.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import tyro
from torch import Tensor

from dit_lens import attribution
from hooked_models import HookedTextToImage

from .measuring import agree, ratio, record, turns

ORIGINAL, SOURCE = "red circle is below blue square", "red circle is above blue square"
PLAIN, NODES, EDGES, PEER = (
    "plain generation",
    "all nodes",
    "all edges",
    "autograd over the whole generation",
)
SUBLAYERS = ("attn", "cross_attn")


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    steps: tuple[int, ...] = (3, 7, 14)
    sample: int = 30
    """Nodes and edges that are patched exactly."""
    repeats: int = 3
    memory: bool = True
    """Measure the memory that each call adds, in a process of its own."""
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


def height(images: Tensor) -> Tensor:
    """A smooth quantity of an image: how far its upper half is from its lower."""
    half = images.shape[-2] // 2
    return (images[..., :half, :] - images[..., half:, :]).square().mean(dim=(1, 2, 3))


def conditions(model: HookedTextToImage, steps: int) -> dict[str, Callable[[], Any]]:
    """Measured calls, by name."""

    def pair() -> Any:
        return attribution.pair(
            *(model.trajectory(text, seed=0, num_steps=steps) for text in (ORIGINAL, SOURCE))
        )

    return {
        PLAIN: lambda: model(ORIGINAL, seed=0, num_steps=steps),
        NODES: lambda: attribution.nodes(pair(), height),
        EDGES: lambda: attribution.edges(pair(), height),
        PEER: lambda: by_autograd(model, steps),
    }


def by_autograd(model: HookedTextToImage, steps: int) -> dict[str, Tensor]:
    """Score every head of each step by one graph: sublayer → [step layer head]."""
    names = [
        f"steps.{step}.cond.blocks.{layer}.{sublayer}.hook_z"
        for sublayer in SUBLAYERS
        for step in range(steps)
        for layer in range(model.cfg.n_layers)
    ]
    _, source = model.run_with_cache(SOURCE, seed=0, num_steps=steps, names_filter=names)
    kept: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    forward = [
        (name, lambda tensor, hook: kept.update({hook.name: tensor.detach()})) for name in names
    ]
    backward = [
        (name, lambda gradient, hook: gradients.update({hook.name: gradient.detach()}))
        for name in names
    ]
    with torch.enable_grad(), model.hooks(fwd_hooks=forward, bwd_hooks=backward):
        height(model(ORIGINAL, seed=0, num_steps=steps)).sum().backward()
    scores = {
        name: ((source[name] - kept[name]) * gradients[name]).sum(dim=(0, 1, 3)) for name in names
    }
    shape = steps, model.cfg.n_layers, -1
    whole = torch.stack(list(scores.values())).reshape(len(SUBLAYERS), *shape)
    return dict(zip(SUBLAYERS, whole, strict=True))


def added_memory(config: Config, steps: int, condition: str) -> float:
    """MiB that a call adds to the peak of this process; a small one has loaded everything
    before.
    """
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model)
    conditions(model, 1)[condition]()
    run = conditions(model, steps)[condition]
    before = psutil.Process().memory_info().rss
    run()
    # ru_maxrss: KiB on Linux
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    rows = []
    for steps in config.steps:
        times, values = turns(conditions(model, steps), config.repeats, config.device)
        worst = 0.0
        for sublayer in SUBLAYERS:
            ours = (
                values[NODES]
                .scores[sublayer]
                .sel(branch="cond")
                .isel(prompt=0)
                .transpose("step", "layer", "head")
                .values
            )
            worst = max(
                worst,
                agree(
                    f"{sublayer} heads", torch.from_numpy(ours.copy()), values[PEER][sublayer], 1e-3
                ),
            )
        for name, spent in times.items():
            start, checked = time.perf_counter(), None
            if name in (NODES, EDGES):
                checked = values[name].verify(k=1, sample=config.sample, seed=0)
            checking = time.perf_counter() - start
            memory = None
            if config.memory:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    memory = pool.apply(added_memory, (config, steps, name))
            rows.append(
                {
                    "steps": steps,
                    "condition": name,
                    "seconds": statistics.median(spent),
                    "plain generations": ratio(times, name, PLAIN),
                    "MiB added": memory,
                    "rank correlation": None if checked is None else str(checked.spearman),
                    "seconds of checking": None if checked is None else checking,
                    "difference": worst if name == PEER else None,
                }
            )
    record("attribution", config, pd.DataFrame(rows), config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
