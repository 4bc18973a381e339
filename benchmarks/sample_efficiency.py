"""Worth of each part of the training recipe: short runs that leave one out, compared after equally
many samples.

`python -m benchmarks.sample_efficiency --out results/sample_efficiency` prints a table; a run that
was stopped goes on. The early indicator is the layout dipole (`dit_lens.training.dynamics.dipole`):
relations are put together when it leaves 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from diffusers import PixArtTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from dit_lens.training import TrainConfig, loop, train
from dit_lens.training.objectives import OBJECTIVES, CleanImageObjective


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    out: Path = Path("results/sample_efficiency")
    size: Literal["nano", "micro", "mini", "B"] = "micro"
    encoder: str = "rte"
    samples: int = 51_200
    """Samples that each run sees."""
    seeds: tuple[int, ...] = (1,)
    variants: tuple[str, ...] = ()
    """Names of those to run; all unless given."""


class UniformNoiseLevels(CleanImageObjective):
    """The same loss with noise levels drawn uniformly instead of mostly high ones."""

    def levels(
        self, n: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, " n"]:
        """Uniform in [0, 1]."""
        return torch.rand(n, generator=generator, device=device)


def adamw_alone(
    model: PixArtTransformer2DModel, config: TrainConfig
) -> dict[str, torch.optim.Optimizer]:
    """In place of `loop.build_optimizers`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return {"adamw": optimizer}


def variants(base: TrainConfig) -> dict[str, TrainConfig]:
    """Name → settings; what is no setting is exchanged by `exchanged`."""
    return {
        "as trained": base,
        "red not named first more often": replace(base, biased_steps=0),
        "no fixed layouts": replace(base, anchored_steps=0),
        "AdamW for every parameter": base,
        "noise levels uniform": base,
        "ε-prediction": replace(base, objective="epsilon"),
        "batches twice as large": replace(
            base,
            batch_size=2 * base.batch_size,
            steps=base.steps // 2,
            biased_steps=base.biased_steps // 2,
            anchored_steps=base.steps,
            evaluate_every=base.evaluate_every // 2,
        ),
        "weights not averaged (no EMA)": replace(base, ema_decay=0.0),
        "no warm-up": replace(base, warmup_steps=0),
        "warm-up five times as long": replace(base, warmup_steps=5 * base.warmup_steps),
        "Muon's rate halved": replace(base, muon_lr=base.muon_lr / 2),
        "Muon's rate doubled": replace(base, muon_lr=2 * base.muon_lr),
        "Muon with three iterations": base,
        "AdamW's rate halved": replace(base, adam_lr=base.adam_lr / 2),
        "AdamW's rate doubled": replace(base, adam_lr=2 * base.adam_lr),
    }


@contextmanager
def exchanged(name: str) -> Iterator[None]:
    """The training loop with one part replaced, for the time of the block."""
    optimizers, objective, muon = loop.build_optimizers, OBJECTIVES["x0"], loop.muon
    if name == "AdamW for every parameter":
        loop.build_optimizers = adamw_alone
    if name == "noise levels uniform":
        OBJECTIVES["x0"] = UniformNoiseLevels
    if name == "Muon with three iterations":
        loop.muon = partial(muon, iterations=3)
    try:
        yield
    finally:
        loop.build_optimizers, OBJECTIVES["x0"], loop.muon = optimizers, objective, muon


def main(config: Config) -> None:
    batch = 64
    steps = config.samples // batch
    base = TrainConfig(
        config.out,
        size=config.size,
        encoder=config.encoder,
        steps=steps,
        batch_size=batch,
        decay_from=0.99,
        biased_steps=3000,
        anchored_steps=steps,
        compile=True,
        dynamics_points=2,
        evaluate_every=steps // 8,
    )
    rows = []
    for seed in config.seeds:
        for name, settings in variants(base).items():
            if config.variants and name not in config.variants:
                continue
            folder = config.out / f"{name} {seed}"
            with exchanged(name):
                train(replace(settings, out=folder, seed=seed))
            rows.append({"variant": name, "seed": seed, **ends(folder)})
            print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)


def ends(run: Path) -> dict[str, object]:
    """Scores of a run at its end, and the samples seen when its dipole first reached one half."""
    table = pd.read_parquet(run / "dynamics.parquet")
    last = table[(table["step"] == table["step"].max()) & table["layer"].isna()].set_index(
        "quantity"
    )
    course = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    came = next((entry["samples"] for entry in course if entry.get("dipole", 0) >= 0.5), None)
    shown = ("dipole", "unique_binding", "relation_loose")
    cells = {
        name: "{:.2f} [{:.2f}, {:.2f}]".format(*last.loc[name, ["value", "low", "high"]])
        for name in shown
    }
    return {"samples": int(last["samples"].iloc[0]), **cells, "dipole ≥ .5 from": came}


if __name__ == "__main__":
    main(tyro.cli(Config))
