"""Causal sweeps over layers × heads × steps, against the peers' loop of one run a cell, in one run.

`python -m benchmarks.sweep --model rte-micro` prints seconds and ratios for two metrics: a one-step effect on x0, against
TransformerLens' `generic_activation_patch` on a view of that step, and an effect on the image, against one whole generation with
hooks a cell, as scripts do it. Both sides zero the same heads on the same prompts and noise, and their numbers are compared.

The bound is arithmetic: what sharing prefixes can save (row-layers of the peer over ours), times what batching can: a row's
time in the peer's batch (the prompts) over that in a full batch, measured here on the denoiser alone.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor
from transformer_lens import patching as tl_patching

from dit_lens import Intervention, sweep
from dit_lens.sweep.cost import seconds_of_step
from hooked_models import HookedTextToImage

PROMPTS = ("red circle is above blue square", "blue triangle is to the left of red circle")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    steps: tuple[int, ...] = (0, 4, 9)
    """Denoising steps of the sweep; every layer and head of each."""
    seed: int = 0
    repeats: int = 3
    """Sides take turns; the median is reported."""
    threads: int = 1
    out: Path | None = None


def strength(tensor: Tensor) -> Tensor:
    """Something to measure of every row: how far its left half is from its right."""
    half = tensor.shape[-1] // 2
    return (tensor[..., :half] - tensor[..., half:]).flatten(1).square().mean(dim=1)


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    cells = sweep.grid(Intervention("blocks.*.cross_attn.hook_z"), layers=range(layers), heads=range(heads), steps=config.steps)
    plans = {on: sweep.plan(model, PROMPTS, config.seed, cells, {"m": sweep.Metric(strength, on=on)}) for on in ("x0", "image")}
    sides: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("x0", "TransformerLens, a step view"): lambda: one_step_peer(model, config),
        ("x0", "sweep"): lambda: ours(plans["x0"]),
        ("image", "one generation a cell"): lambda: whole_run_peer(model, config, cells),
        ("image", "sweep"): lambda: ours(plans["image"]),
    }
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    values = {}
    for turn in range(config.repeats + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            values[side] = run()
            if turn:  # the first turn warms up
                seconds[side].append(time.perf_counter() - start)
    rows_of_peer = len(PROMPTS)
    batching = (seconds_of_step(plans["image"], rows_of_peer) / rows_of_peer) / (seconds_of_step(plans["image"], 32) / 32)
    rows = []
    for on, peer in (("x0", "TransformerLens, a step view"), ("image", "one generation a cell")):
        worst = float((values[on, peer] - values[on, "sweep"]).abs().max())
        if worst > TOLERANCE * float(values[on, peer].abs().max()):
            raise SystemExit(f"The sides do not agree on {on}: they differ by {worst}.")
        theirs, mine = (pd.Series(seconds[on, side]).median() for side in (peer, "sweep"))
        cost = plans[on].cost
        peer_layers = len(cells) * len(PROMPTS) * 2 * layers * (plans[on].num_steps if on == "image" else 1)
        bound = peer_layers / cost.row_layers * batching
        rows.append(
            {
                "metric": on,
                "peer": peer,
                "cells": cost.cells,
                "peer s": theirs,
                "sweep s": mine,
                "expected s": cost.seconds,
                "ratio": theirs / mine,
                "bound": bound,
                "of bound": theirs / mine / bound,
                "largest difference": worst,
            }
        )
    table = pd.DataFrame(rows)
    machine = f"{platform.machine()}, {config.threads} thread(s), {model.device.type}, torch {torch.__version__}"
    print(f"{config.model}, {layers} layers × {heads} heads × {len(config.steps)} steps × {len(PROMPTS)} prompts; {machine}")
    print(f"a row in a batch of 32 against one in the peer's batch of {rows_of_peer}: {batching:.2f} times faster")
    print(table.round(3).to_string(index=False))
    if config.out is not None:
        facts = {"config": {k: str(v) for k, v in asdict(config).items()}, "machine": machine, "batching": batching}
        config.out.write_text(json.dumps(facts | {"rows": table.to_dict("records")}, indent=1))


def ours(plan: sweep.Plan) -> Tensor:
    """Values [cell, prompt] of a plan that is run."""
    return torch.from_numpy(plan.run()["m"].isel(seed=0).values)


def whole_run_peer(model: HookedTextToImage, config: Config, cells: dict[str, Intervention]) -> Tensor:
    """One generation of all prompts for every cell, hooked from its start."""
    prompts = list(PROMPTS)
    return torch.stack(
        [
            strength(model.run_with_hooks(prompts, seed=config.seed, fwd_hooks=cell.hooks(model, prompts)))
            for cell in cells.values()
        ]
    ).double()


def one_step_peer(model: HookedTextToImage, config: Config) -> Tensor:
    """TransformerLens' patching of every head's z by zeros, on a view of each step."""
    found = []
    for step in config.steps:
        view, tokens = model.at(step=step, prompts=list(PROMPTS), seed=config.seed, returns="x0")
        _, zeros = view.run_with_cache(tokens)
        zeros.cache_dict.update({name: torch.zeros_like(value) for name, value in zeros.items()})
        setter, axes = tl_patching.layer_head_vector_patch_setter, ("layer", "head")
        result = tl_patching.generic_activation_patch(view, tokens, zeros, strength, setter, "cross_z", axes, reduce="none")
        found.append(result.values.flatten(0, 1))
    return torch.stack(found, dim=1).flatten(0, 1).double()


if __name__ == "__main__":
    main(tyro.cli(Config))
