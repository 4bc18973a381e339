"""RTE without positions: relations that a bag of words can tell apart, and the others.

`python -m recipes.positions_needed`

Paper: "RTE-B w/o pos" binds .41 and relates .15 (loose .415 by another evaluation) where RTE-B with
positions relates .86. Falsified by this: a model without positions that tells "A above B" from
"B above A".

The exact bound: a sentence that names both colours shares its words with three others that are
equally frequent: two ways to bind colours to shapes times two to say which object is meant. So at
most .50 bind and .25 relate, and of those that bind, half relate; the axis (above or below, left or
right, …) is in the bag. The control is the model with positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from dit_lens import viz
from dit_lens.stats import Interval, proportion
from dit_lens.task import DIRECTIONS
from dit_lens.task.captions import TRAINED
from dit_lens.task.scene import BAND

from .claims import Claim, evaluation_of, independent, report

QUESTIONS = {  # name → (the paper's number, its range without word order)
    "binds": ("RTE-B w/o pos .41", (0.0, 0.5)),
    "relates": ("RTE-B w/o pos .15", (0.0, 0.25)),
    "relates, of those that bind": ("–", (0.4, 0.6)),
    "has the axis right, of those that bind": ("–", (0.9, 1.0)),
}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    without: str = "rte-nopos-micro"
    with_positions: str = "rte-micro"
    scenes: int = 256
    """A split, of models that bring no evaluation of their own."""
    out: Path = Path("results/positions_needed")


def main(config: Config) -> None:
    answers = {}
    for model in (config.without, config.with_positions):
        rows = evaluation_of(model, config.scenes, config.out)
        answers[model] = answer(rows[rows["template"] == TRAINED])
    claims = [
        Claim(
            f"{config.without}: {question}",
            paper,
            answers[config.without][question],
            predicted,
            f"{config.with_positions} {answers[config.with_positions][question]}",
            independent(
                answers[config.without][question], answers[config.with_positions][question]
            ),
        )
        for question, (paper, predicted) in QUESTIONS.items()
    ]
    n = int((rows["template"] == TRAINED).sum())
    report(
        "Word order",
        claims,
        config.out,
        f"{n} images, those that bind where it says so, a noise each, 1 run",
    )
    viz.style.save(figure(answers), config.out / "positions_needed.png")


def answer(rows: pd.DataFrame) -> dict[str, Interval]:
    """Every question's share of images, of both splits, with its Wilson interval."""
    both = rows[rows["unique_binding"] == 1]
    offset = np.stack([both["x1"] - both["x2"], both["y1"] - both["y2"]], axis=1).astype(float)
    named = np.array([DIRECTIONS[relation] for relation in both["relation"]], float)
    along = np.where(named == 0, np.inf, offset * named)
    axis = (along > BAND).all(axis=1) | (np.where(named == 0, -np.inf, along) < -BAND).all(axis=1)
    return {
        "binds": proportion(rows["unique_binding"].to_numpy(float)),
        "relates": proportion(rows["relation_loose"].to_numpy(float)),
        "relates, of those that bind": proportion(both["relation_loose"].to_numpy(float)),
        "has the axis right, of those that bind": proportion(axis.astype(float)),
    }


@viz.style.styled
def figure(answers: dict[str, dict[str, Interval]]) -> Figure:
    """Answers of both models, and the bounds of a bag of words."""
    drawn, ax = plt.subplots(figsize=(9.2, 3.2), layout="constrained")
    for number, (model, found) in enumerate(answers.items()):
        viz.intervals(ax, found.values(), np.arange(len(found)) + 0.2 * number - 0.1, label=model)
    for row, bound in enumerate((0.5, 0.25, 0.5)):
        label = "a bag of words at best" if row == 0 else None
        ax.plot([bound] * 2, [row - 0.35, row + 0.35], color=viz.style.INK, label=label)
    viz.name_rows(ax, list(QUESTIONS))
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("share of images")
    told = ", ".join(f"{model} {found['relates'].mean:.2f}" for model, found in answers.items())
    drawn.suptitle(f"Share of images with the relation as prompted: {told}")
    drawn.legend(loc="outside lower center", ncols=3)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
