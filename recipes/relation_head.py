"""Redraw images with the opposite relation, through four heads. `python -m recipes.relation_head`

Source: Wang, Fan, Pan, *Circuit Mechanisms for Spatial Relation Generation in Diffusion
Transformers* (arXiv 2601.06338), sections 4.1 and 4.2, who mask one head. Here four heads of
`rte-micro` are given the keys and values of the opposite prompt ("below" for "above") and nothing
else is changed; as many random heads of the same layers, another set for every image, are the
control.

`recipes.relation_circuit` finds such sets, and measures them with more images and conditions. Three
of the four can be told from the weights alone: they hold nearly all gain² of an axis.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_lens import scenes, screening, viz
from dit_lens.intervene.interchange import Interchange, matched_sets
from dit_lens.stats import Interval, proportion
from dit_lens.store import write_json
from dit_lens.training.dynamics import axis_contrasts
from hooked_models import HookedTextToImage

HEADS = {"rte-micro": ("L2H1", "L1H0", "L2H2", "L1H1"), "rte-mini": ("L1H0", "L2H1", "L2H5")}
"""Bundled model → heads that `relation_circuit` found to be needed."""
CONDITIONS = ("as prompted", "found heads", "random heads")
SHOWN = 6


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    """Bundled model, pipeline folder or hub id."""
    heads: tuple[str, ...] = ()
    """Heads to exchange; by default those of `HEADS`."""
    images: int = 32
    """Images a condition; all conditions share prompts and noise."""
    seed: int = 0
    out: Path = Path("results/relation_head")


@torch.no_grad()
def main(config: Config) -> None:
    console = Console()
    heads = config.heads or HEADS.get(config.model, ())
    if not heads:
        raise SystemExit(
            f"No heads are known of {config.model}: name some, --heads L2H1 L1H0, or run "
            "recipes.relation_circuit."
        )
    model = HookedTextToImage.from_pretrained(config.model)
    console.print(
        f"[bold]{config.model}[/bold]: {model.cfg.n_layers} layers × {model.cfg.n_heads} heads"
    )
    show(console, "Share of gain² by axis, from the weights alone", shares(model, heads))

    wanted = scenes.sample(config.images, seed=config.seed + 12, split="all", color_words="both")
    with console.status("drawing"):
        images = drawn(model, heads, wanted, config.seed)
    results = judged(images, wanted)
    title = (
        f"Keys and values of the opposite prompt ({config.images} images, same prompts and noise): "
        "share [95 % interval]"
    )
    show(console, title, results.drop(columns=list(Interval._fields)))
    figure = redrawn_figure(images, wanted, heads, results)

    config.out.mkdir(parents=True, exist_ok=True)
    viz.style.save(figure, config.out / "redrawn.png")
    results.to_csv(config.out / "redrawn.csv", index=False)
    facts = {
        "model": config.model,
        "heads": list(heads),
        "images": config.images,
        "seed": config.seed,
    }
    write_json(config.out / "result.json", {**facts, "results": results.to_dict("records")})
    console.print(f"figure and numbers: {config.out}/redrawn.png, redrawn.csv, result.json")


def shares(model: HookedTextToImage, heads: Sequence[str]) -> pd.DataFrame:
    """Share of the gain² of each axis of the given heads, and of the strongest other one
    (`screening.screen_axes`).
    """
    table = screening.screen_axes(model.dit, axis_contrasts(model)["words"])
    names = [f"L{row.layer}H{row.head}" for row in table.itertuples()]
    by_axis = table.assign(name=names).pivot(index="name", columns="axis", values="share")[
        list(screening.AXES)
    ]
    others = by_axis.drop(index=list(heads))
    shown = pd.concat(
        [by_axis.loc[list(heads)], others.max().to_frame(f"most of the other {len(others)}").T]
    )
    return shown.map("{:.3f}".format).rename_axis("head").rename_axis(None, axis=1)


def drawn(
    model: HookedTextToImage, heads: Sequence[str], wanted: Sequence[scenes.Scene], seed: int
) -> dict[str, Float[Tensor, "image 3 height width"]]:
    """Images of each of `CONDITIONS`, from the same noise."""
    swap = Interchange(model, wanted, [scenes.opposite(scene) for scene in wanted])
    sets = list(matched_sets(model, heads, len(wanted), np.random.default_rng(seed)))
    random = [
        hook for one in swap.of_each(sets, "relation") for hook in one.hooks(model, swap.texts)
    ]
    noise = list(range(seed + 500, seed + 500 + len(wanted)))
    hooks = {
        "as prompted": [],
        "found heads": swap.hooks(heads, "relation"),
        "random heads": random,
    }
    return {
        name: model.run_with_hooks(swap.texts, seed=noise, fwd_hooks=hooks[name])
        for name in CONDITIONS
    }


def judged(
    images: Mapping[str, Float[Tensor, "image 3 height width"]], wanted: Sequence[scenes.Scene]
) -> pd.DataFrame:
    """A row a condition and verdict, of the images that bind: columns heads, relation, text,
    images, mean, low, high.
    """
    turned = [scenes.opposite(scene) for scene in wanted]
    rows = []
    for condition, some in images.items():
        binding = scenes.evaluate(some, wanted)["unique_binding"].values
        for relation, goal in (("as prompted", wanted), ("opposite", turned)):
            found = proportion(
                scenes.evaluate(some, goal)["relation_loose"].values[binding].astype(float)
            )
            rows.append(
                {
                    "heads": condition,
                    "relation drawn": relation,
                    "share": str(found),
                    "images": int(binding.sum()),
                }
                | found._asdict()
            )
    return pd.DataFrame(rows)


@viz.style.styled
def redrawn_figure(
    images: Mapping[str, Float[Tensor, "image 3 height width"]],
    wanted: Sequence[scenes.Scene],
    heads: Sequence[str],
    results: pd.DataFrame,
) -> Figure:
    """A column a prompt: the image, redrawn with the found heads exchanged, and with random heads
    exchanged.

    The first image of each relation whose plain image binds, then others of those.
    """
    binding = np.flatnonzero(
        scenes.evaluate(images[CONDITIONS[0]], wanted)["unique_binding"].values
    )
    first = {wanted[i].relation: i for i in reversed(binding)}
    chosen = [*sorted(first.values()), *(i for i in binding if i not in first.values())][:SHOWN]
    opposite = results[results["relation drawn"] == "opposite"].set_index("heads")
    figure, grid = plt.subplots(
        len(images),
        len(chosen),
        figsize=(min(1.45 * len(chosen) + 1.3, viz.style.WIDEST), 5.6),
        layout="constrained",
        squeeze=False,
    )
    labels = (
        "as prompted",
        f"{' '.join(heads[:2])}\n{' '.join(heads[2:])}\nread the opposite",
        "random heads\nread the opposite",
    )
    for row, label, some in zip(grid, labels, images.values(), strict=True):
        for ax, i in zip(row, chosen, strict=True):
            viz.bare(ax).imshow(some[i].permute(1, 2, 0).float().cpu().numpy())
        row[0].text(-0.08, 0.5, label, ha="right", va="center", transform=row[0].transAxes)
    for ax, i in zip(grid[0], chosen, strict=True):
        scene = wanted[i]
        phrase = textwrap.fill(scene.phrase, 15)
        title = f"{scene.color1} {scene.shape1}\n{phrase}\n{scene.color2} {scene.shape2}"
        ax.set_title(title, fontsize=9)
    told = "; ".join(
        f"{name} {share}" for name, share in opposite["share"].items() if name != CONDITIONS[0]
    )
    figure.suptitle(f"Opposite relation drawn, of the images that bind:\n{told}")
    return figure


def show(console: Console, title: str, frame: pd.DataFrame) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    indexed = frame.reset_index() if frame.index.name else frame
    for column in indexed.columns:
        table.add_column(str(column), overflow="fold")
    for row in indexed.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
