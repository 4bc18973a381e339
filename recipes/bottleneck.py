"""Where the relation gets lost: in the text encoder or in cross-attention. `python -m recipes.bottleneck`

Sets side by side, for the RTE and the T5 model, what `robustness` (wordings), `t5_fusion` (where the relation stands in the text,
and words hidden from all heads) and `relation_heads` (words hidden from the heads found) measure. It reads what those recipes
left in their folders, and measures what is missing there, so only the first time takes long (about as long as the others' parts).

Paper: sections 5 and 6, figures 6 to 8: with a frozen T5 the relation is fused into the second shape word, and any wording that
moves this vector moves the objects: the text encoder is the bottleneck; with RTE relation heads read the words themselves,
whatever the wording. What would falsify it: wordings cost both models alike, or hiding the relation words does.

The rule, stated beforehand. Cross-attention is a model's bottleneck if wordings are harmless (change of relation within ±.1, mean
over them) while hiding the relation words from heads costs at least .25; the text encoder, if wordings cost at least .1, hardly
any of it by binding (within ±.1), and hiding the relation words is harmless. By whole intervals; else undecided. Controls: the
other model, and random words. Models differ in their training runs too: one run each, so a difference is between two models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

from dit_lens.stats import Interval, clustered_mean
from dit_lens.task.captions import TRAINED
from hooked_models import HookedTextToImage

from . import relation_heads, t5_fusion
from .claims import Claim, evaluation_of, report, stage
from .knockouts import change, screened

WORDINGS = ("no is", "the second", "the both", "no is, the second", "crimson", "navy")
"""Templates that keep the order of the words."""
HARMLESS, HARMFUL, LOST = (-0.1, 0.1), (-1.0, -0.25), (-1.0, -0.1)
UNKNOWN = Interval(*[np.nan] * 3)
WORDED, BINDS, SHARE, HIDDEN, SHAPE_HIDDEN, IN_HEADS = (
    "other wordings: relation",
    "other wordings: binding",
    "relation's partial R² at the second shape word",
    "relation words hidden from all heads: relation",
    "second shape word hidden from all heads: relation",
    "relation words hidden from the heads found: relation",
)


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    rte: str = "rte-micro"
    t5: str = "t5-micro"
    scenes: int = 256
    """A split, of models that bring no evaluation of their own."""
    robustness: Path = Path("results/robustness")
    fusion: Path = Path("results/t5_fusion")
    heads: Path = Path("results/relation_heads")
    """Folders of the recipes that are read; each takes what a default run leaves there."""
    full: bool = False
    """What `--full` runs of them leave instead."""
    out: Path = Path("results/bottleneck")


def main(config: Config) -> None:
    found = {"rte": measures(config, config.rte, "rte"), "t5": measures(config, config.t5, "t5")}
    names = {"rte": config.rte, "t5": config.t5}
    where = {names[role]: bottleneck(of_model) for role, of_model in found.items()}
    claims = [*model_claims(names, found), *contrasts(names, found)]
    report("Bottleneck: " + ", ".join(f"{name}: {part}" for name, part in where.items()), claims, config.out, bottleneck=where)
    rows = [
        {"model": names[role], "measure": measure, **value._asdict(), "bottleneck": where[names[role]]}
        for role, of_model in found.items()
        for measure, value in of_model.items()
    ]
    pd.DataFrame(rows).to_parquet(config.out / "measures.parquet", index=False)
    figure({names[role]: of_model for role, of_model in found.items()}, where).savefig(config.out / "bottleneck.png", dpi=150)


# What the other recipes measured


@torch.no_grad()
def measures(config: Config, name: str, role: str) -> dict[str, Interval]:
    """Every number of one model; NaN where there is none."""
    model = HookedTextToImage.from_pretrained(name)
    fusion, heads = t5_fusion.Config(), relation_heads.Config(model=name, full=config.full, out=config.heads)
    scale, draws = (2, 4) if config.full else (1, fusion.controls)
    shares = stage(config.fusion, f"{role}-variance", model, t5_fusion.relation_shares).set_index(["role", "at"])
    hidden = stage(config.fusion, f"{role}-knockout", model, t5_fusion.knockouts, fusion.knockouts * scale, draws, fusion.seed)
    by_condition = hidden[hidden["verdict"] == "relation_loose"].set_index("condition")
    bounds = list(Interval._fields)
    masked = UNKNOWN
    if role == "rte" and (some := screened(model)[1]):
        parts = relation_heads.measured(heads, model, "groups", relation_heads.group_knockouts, some, heads.pairs)
        masked = change(pd.concat(parts), relation_heads.ALL, "relation_loose")
    rows = evaluation_of(name, config.scenes, config.robustness)
    return {
        WORDED: worded(rows, "relation_loose"),
        BINDS: worded(rows, "unique_binding"),
        SHARE: Interval(*shares.loc[("shape2", "text"), bounds]),
        HIDDEN: Interval(*by_condition.loc["relation words", bounds]),
        SHAPE_HIDDEN: Interval(*by_condition.loc["second shape word", bounds]),
        IN_HEADS: masked,
    }


def worded(rows: pd.DataFrame, metric: str) -> Interval:
    """What other wordings change, mean over those that the model knows, paired by scene and noise; interval over scenes."""
    trained = rows[(rows["split"] == "train") & (rows["template"] == TRAINED)].set_index("scene")[metric]
    others = rows[(rows["split"] == "train") & rows["template"].isin(WORDINGS)].pivot(
        index="scene", columns="template", values=metric
    )
    return clustered_mean(others.sub(trained.loc[others.index], axis=0).to_numpy(float)) if len(others) else UNKNOWN


# Claims


def inside(value: Interval, bounds: tuple[float, float]) -> bool:
    """Whether a whole interval is; False of NaN."""
    return bounds[0] <= value.low and value.high <= bounds[1]


def bottleneck(found: dict[str, Interval]) -> str:
    """By the rule of the module."""
    if inside(found[WORDED], HARMLESS) and inside(found[HIDDEN], HARMFUL):
        return "cross-attention"
    if inside(found[WORDED], LOST) and inside(found[BINDS], HARMLESS) and inside(found[HIDDEN], HARMLESS):
        return "text encoder"
    return "undecided"


PAPER = {
    WORDED: ("stable", '.81 → .50 with "the"'),
    BINDS: ("–", "rises"),
    SHARE: ("0 expected", ".1205"),
    HIDDEN: ("critical", "≈ no change"),
    SHAPE_HIDDEN: ("–", "about −.4 (halved)"),
    IN_HEADS: (".67 → .33 (one head)", "no such head"),
}
PREDICTED = {
    WORDED: (HARMLESS, LOST),
    BINDS: (HARMLESS, HARMLESS),
    SHARE: ((0.0, 0.05), (0.05, 1.0)),
    HIDDEN: (HARMFUL, HARMLESS),
    SHAPE_HIDDEN: (HARMFUL, HARMFUL),
    IN_HEADS: (relation_heads.HALF_OF_PAPER, (np.nan, np.nan)),
}
"""Measure → for the RTE and for the T5 model."""


def model_claims(names: dict[str, str], found: dict[str, dict[str, Interval]]) -> list[Claim]:
    """Every measure of each model, with the other model's number as its control."""
    claims = []
    for measure, (number, role) in product(PAPER, enumerate(("rte", "t5"))):
        other = "t5" if role == "rte" else "rte"
        if not np.isnan(PREDICTED[measure][number][0]):
            beside = found[other][measure]
            control = "" if np.isnan(beside.mean) else f"{names[other]} {beside}"
            claims.append(
                Claim(
                    f"{names[role]}: {measure}", PAPER[measure][number], found[role][measure], PREDICTED[measure][number], control
                )
            )
    return claims


def contrasts(names: dict[str, str], found: dict[str, dict[str, Interval]]) -> list[Claim]:
    """What tells the two models apart."""
    wanted = {
        WORDED: ("only T5 loses", (0.1, 1.0)),
        HIDDEN: ("only RTE loses", HARMFUL),
        SHARE: ("only T5 has it", (-1.0, -0.05)),
    }
    return [
        Claim(
            f"{names['rte']} minus {names['t5']}: {measure}",
            paper,
            difference(found["t5"][measure], found["rte"][measure]),
            predicted,
        )
        for measure, (paper, predicted) in wanted.items()
    ]


def difference(before: Interval, after: Interval) -> Interval:
    """after − before of two independent estimates (Newcombe 1998, Statistics in Medicine 17, p. 873)."""
    mean = after.mean - before.mean
    low = mean - np.hypot(after.mean - after.low, before.high - before.mean)
    return Interval(mean, float(low), float(mean + np.hypot(after.high - after.mean, before.mean - before.low)))


def figure(found: dict[str, dict[str, Interval]], where: dict[str, str]) -> Figure:
    """Every measure of both models, side by side."""
    measures_ = list(PAPER)
    drawn, ax = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    for number, (name, of_model) in enumerate(found.items()):
        values = [of_model[measure] for measure in measures_]
        reach = [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]
        places = np.arange(len(measures_)) + 0.24 * number - 0.12
        ax.errorbar([value.mean for value in values], places, xerr=reach, fmt="o", label=f"{name}: {where[name]}")
    ax.axvline(0, color="grey", linewidth=0.6)
    ax.set_yticks(range(len(measures_)), [measure.replace(": ", ":\n") for measure in measures_], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("change of accuracy, paired (share of variance in the third row), 95 %")
    ax.legend(frameon=False, fontsize=9, title="bottleneck", loc="upper left", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
