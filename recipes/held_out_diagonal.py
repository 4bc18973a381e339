"""Can a model draw a diagonal that it never read, and do its heads tell beforehand?

`python -m recipes.held_out_diagonal --runs FOLDER`

Not in the paper. Two small models are trained without any phrase of "upper left", but with "upper
right", "lower left", "above" and "left" (docs/training.md, "Study models"). If one set of heads
writes the vertical axis and another one the horizontal axis, the unread diagonal is the sum of two
read parts, and should be drawn; if the same heads write both, there is no reason why it should.
Falsified by this: separate heads and "upper left" not drawn.

Prediction: `recipes/PREDICTIONS.md`, "generalisation and sparsity", committed before the trainings.
Images are judged only where both objects are there: shapes and colours are another question. The
three diagonals that were read are the control.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

from dit_lens import scenes
from dit_lens.readout import screening
from dit_lens.stats import Interval, finite, proportion
from dit_lens.task.scene import Relation
from dit_lens.training import finished
from dit_lens.viz import intervals, style
from hooked_models import HookedTextToImage

from .claims import Claim, independent, report, stage
from .recurrence import screening_by_axis

RUNS = ("without-upper-left-0", "without-upper-left-1")
UNREAD: Relation = "upper_left"
READ: tuple[Relation, ...] = ("upper_right", "lower_left", "lower_right")
SHARED = 0.3
"""Smallest share of gain² of both axes with which a head serves both."""
DRAWN = {True: (0.8, 1.0), False: (0.0, 0.5)}
"""Predicted share of images with the relation, by whether the axes have heads of their own."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    runs: Path = Path("runs")
    """Folder with the study models' runs; those that are not there are left out."""
    images: int = 48
    """Images of each diagonal."""
    out: Path = Path("results/held_out_diagonal")


def main(config: Config) -> None:
    claims, tables = [], {}
    for run in RUNS:
        if not finished(config.runs / run):
            nothing = Interval(*[np.nan] * 3)
            claims.append(Claim(f"{run}: unread diagonal drawn", "–", nothing, DRAWN[True]))
            continue
        model = HookedTextToImage.from_pretrained(str(config.runs / run / "pipeline"))
        heads = stage(config.out, f"{run}-heads", model, screening_by_axis)
        tables[run] = stage(config.out, f"{run}-images", model, drawn, config.images)
        claims += claims_of(run, heads, tables[run])
    report("A diagonal that was never read", claims, config.out)
    if tables:
        images = pd.concat([table.assign(run=run) for run, table in tables.items()])
        images.to_parquet(config.out / "images.parquet", index=False)
    style.save(figure(tables), config.out / "diagonals.png")


@torch.no_grad()
def drawn(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """A row an image: relation, `bound` (both objects are there), `right` (relation as prompted),
    and the layout's `x` and `y` as prompted.
    """
    pool = scenes.sample(64 * n, seed=51, split="all", color_words="both")
    rows = []
    for number, relation in enumerate((UNREAD, *READ)):
        wanted = [scene for scene in pool if scene.relation == relation][:n]
        seeds = [9600 + 1000 * number + i for i in range(len(wanted))]
        images = model([scenes.caption(scene) for scene in wanted], seed=seeds)
        verdicts, layout = scenes.evaluate(images, wanted), scenes.layout(images, wanted)
        x, y = scenes.DIRECTIONS[relation]
        rows.append(
            pd.DataFrame(
                {
                    "relation": relation,
                    "bound": verdicts["unique_binding"].values.astype(float),
                    "right": verdicts["relation_loose"].values.astype(float),
                    "x": (layout["x_sign"].values == x).astype(float),
                    "y": (layout["y_sign"].values == y).astype(float),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def claims_of(run: str, heads: pd.DataFrame, images: pd.DataFrame) -> list[Claim]:
    """Shares of heads that serve both axes, and the unread diagonal beside the read ones."""
    shares = heads.pivot(index=["layer", "head"], columns="axis", values="share")
    both = shares[list(screening.AXES)].min(axis=1)
    most = "L{}H{}".format(*both.index[int(both.argmax())])
    separate = bool(both.max() <= SHARED)
    bound = images[images["bound"] == 1]
    unread = bound[bound["relation"] == UNREAD]
    read = proportion(bound.loc[bound["relation"] != UNREAD, "right"].to_numpy())
    right = proportion(unread["right"].to_numpy())
    basis = f"{len(unread)} images with both objects, a noise each, 1 run"
    everywhere = images[images["relation"] == UNREAD]
    placed = proportion((everywhere["x"] * everywhere["y"]).to_numpy())
    axes = ", ".join(f"{axis} {proportion(unread[axis].to_numpy())}" for axis in ("y", "x"))
    return [
        Claim(
            f"{run}: largest share of gain² that one head has of both axes",
            "–",
            finite(float(both.max())),
            None,
            f"{most}; above {SHARED:g} the axes share heads",
            basis="weights of 1 run",
        ),
        Claim(
            f'{run}: "upper left" drawn, of images with both objects',
            "–",
            right,
            DRAWN[separate],
            f"the three read diagonals {read}; of the unread one alone, right on {axes}",
            basis=basis,
            share=True,
        ),
        Claim(
            f'{run}: "upper left" by colours alone, of all images',
            "–",
            placed,
            None,
            f"vertical {proportion(everywhere['y'].to_numpy())}, "
            f"horizontal {proportion(everywhere['x'].to_numpy())}",
            basis=f"{len(everywhere)} images, a noise each, 1 run",
            share=True,
        ),
        Claim(
            f"{run}: unread diagonal minus read ones",
            "–",
            independent(right, read),
            None,
            basis=basis,
        ),
    ]


@style.styled
def figure(tables: dict[str, pd.DataFrame]) -> Figure:
    """Share of right relations by diagonal, of images with both objects; the unread one filled."""
    drawn, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    told = []
    for number, table in enumerate(tables.values()):
        right = table[table["bound"] == 1].set_index("relation")["right"]
        found = [proportion(right[right.index == name].to_numpy()) for name in (UNREAD, *READ)]
        at = np.arange(4) + 0.16 * (number - (len(tables) - 1) / 2)
        color, label = f"C{number}", f"training run {number}"
        intervals(ax, found[:1], at[:1], upright=True, color=color, label=label)
        intervals(ax, found[1:], at[1:], upright=True, color=color, markerfacecolor="none")
        told.append(f"{found[0].mean:.2f}")
    names = [name.replace("_", " ") for name in (UNREAD, *READ)]
    ax.set_xticks(range(4), [f"{names[0]}\n(never read)", *names[1:]])
    ax.set(ylim=(-0.05, 1.05), ylabel="relation as prompted")
    if tables:
        ax.set_title(
            f"A diagonal never read: right in {' and '.join(told)} of images with both objects"
        )
        ax.legend(loc="lower right")
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
