"""Make the table of `benchmarks.search_race`: effects and scores of 504 cells of rte-micro on many
scenes, each with noise 0 and with its own; one takes 50 s of a core, and a killed run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro

from dit_lens import Intervention, scenes, sweep
from dit_lens.sweep.scores import Question, scores_of_rows
from hooked_models import HookedTextToImage

from .search_race import OTHER_NOISE
from .sweep import strength

SCORED = ("relation", "strength")


@dataclass(frozen=True)
class Config:
    """Settings of the table."""

    scenes: int = 33
    seed: int = 3
    folder: Path = Path("results/search_table")
    out: Path = Path(__file__).parent / "search_race.parquet"


@torch.no_grad()
def main(config: Config) -> None:
    """Run every scene, and write the table."""
    torch.set_num_threads(1)
    model = HookedTextToImage.from_pretrained("rte-micro")
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    cells = {
        f"{kind} {name}": one
        for kind in ("cross_attn", "attn")
        for name, one in sweep.grid(
            Intervention(f"blocks.*.{kind}.hook_z"), layers=layers, heads=heads, steps=range(14)
        ).items()
    }
    wanted = scenes.sample(config.scenes, seed=config.seed, color_words="both")
    parts = []
    for place, scene in enumerate(wanted):
        for noise in sorted({0, place}):
            found = of_scene(model, scene, noise, cells, config.folder / f"{place:03d}-{noise}")
            number = place if noise == place else place + OTHER_NOISE
            parts.append(found.assign(scene=np.int16(number)))
    table = pd.concat(parts, ignore_index=True)
    table.to_parquet(config.out, index=False, compression="zstd")
    print(f"{config.out}: {len(wanted)} scenes, {config.out.stat().st_size / 1e3:.0f} kB")


def of_scene(
    model: HookedTextToImage,
    scene: scenes.Scene,
    noise: int,
    cells: dict[str, Intervention],
    folder: Path,
) -> pd.DataFrame:
    """Rows of one scene: metric, cell, effect and score (NaN for the latent's displacement, which
    has no slope).
    """
    metrics = {
        "relation": sweep.relation_metric([scene]),
        "strength": sweep.Metric(strength),
        "latent": sweep.Metric(sweep.displacement, on="latent", given=("baseline",)),
    }
    plan = sweep.plan(model, scenes.caption(scene), noise, cells, metrics, batch=32)
    found = plan.run(folder)
    parts = []
    for name, metric in metrics.items():
        effect = (found[name] - found[f"{name}_baseline"]).values[:, 0, 0]
        score = np.full(len(cells), np.nan)
        if name in SCORED:
            question = Question(name, metric, "", "attribution", tuple(range(len(cells))))
            score = scores_of_rows(plan, plan.inputs(), question, np.arange(1))[0][:, 0]
        parts.append(
            pd.DataFrame(
                {
                    "metric": name,
                    "cell": list(cells),
                    "effect": effect.astype(np.float32),
                    "score": score.astype(np.float32),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
