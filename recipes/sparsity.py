"""Is it weight decay that makes a relation circuit sparse, or the number of heads?

`python -m recipes.sparsity --runs FOLDER`

Not in the paper, where one head of 144 carries the relation. Eight small models of one width are
trained, with 2, 3, 6 and 12 heads a layer, without weight decay and with .5 (docs/training.md,
"Study models"). The effective number of heads of an axis is 1 / Σ share², share being the part of
Σ gain² that one head has. Falsified by this: weight decay does not lower it, or it grows with
the number of heads as its square root or faster.

Prediction: `recipes/PREDICTIONS.md`, "generalisation and sparsity", committed before the trainings.
One training run a model: what differs between runs of one setting is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from dit_lens.readout.screening import AXES
from dit_lens.stats import Interval, finite
from dit_lens.training import finished
from dit_lens.viz import style

from .claims import Claim, report

HEADS, DECAYS = (2, 3, 6, 12), ("0", "0.5")


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    runs: Path = Path("runs")
    """Folder with the study models' runs; those that are not there are left out."""
    out: Path = Path("results/sparsity")


def main(config: Config) -> None:
    courses = {
        (heads, decay): effective_heads(pd.read_parquet(run / "dynamics.parquet"))
        for heads in HEADS
        for decay in DECAYS
        if finished(run := config.runs / f"heads-{heads}-decay-{decay}")
    }
    report("What makes a relation circuit sparse", claims_of(courses), config.out)
    style.save(figure(courses), config.out / "effective_heads.png")
    if courses:
        table = pd.concat(courses, names=["heads", "decay"]).reset_index(["heads", "decay"])
        table.to_parquet(config.out / "effective_heads.parquet", index=False)


def effective_heads(dynamics: pd.DataFrame) -> pd.DataFrame:
    """Effective number of heads by step, and samples seen: the mean of both axes' 1 / Σ share²."""
    counts = []
    for axis in AXES:
        gains = dynamics[
            (dynamics["quantity"] == f"gain_{axis}") & (dynamics["source"] == "words")
        ].pivot(index="samples", columns=["layer", "head"], values="value")
        squares = gains.to_numpy(float) ** 2
        shares = squares / squares.sum(axis=1, keepdims=True)
        counts.append(pd.Series(1 / (shares**2).sum(axis=1), index=gains.index))
    return pd.concat(counts, axis=1).mean(axis=1).rename("effective").reset_index()


def claims_of(courses: dict[tuple[int, str], pd.DataFrame]) -> list[Claim]:
    """At the end of training: decay against none, and 12 heads against 3."""
    last = {run: float(course["effective"].iloc[-1]) for run, course in courses.items()}

    def of(value: float, *runs: tuple[int, str]) -> Interval:
        return finite(value) if set(runs) <= set(last) else Interval(*[np.nan] * 3)

    claims = []
    for heads in HEADS:
        none, some = ((heads, decay) for decay in DECAYS)
        claims.append(
            Claim(
                f"{heads} heads a layer: effective heads with weight decay .5 minus without",
                "–",
                of(last.get(some, 0) - last.get(none, 0), none, some),
                (-100.0, 0.0),
                f"{last[some]:.2f} against {last[none]:.2f}" if {none, some} <= set(last) else "",
                basis="weights of 1 run each",
            )
        )
    for decay in DECAYS:
        few, many = (3, decay), (12, decay)
        claims.append(
            Claim(
                f"weight decay {decay}: effective heads of 12 heads a layer, in those of 3",
                "–",
                of(last.get(many, 0) / last.get(few, 1), few, many),
                (0.0, 2.0),
                "square root of 12 / 3: 2; in proportion: 4",
                basis="weights of 1 run each",
            )
        )
    return claims


@style.styled
def figure(courses: dict[tuple[int, str], pd.DataFrame]) -> Figure:
    """Effective number of heads over training, a panel a weight decay."""
    drawn, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for ax, decay in zip(axes, DECAYS, strict=True):
        for number, heads in enumerate(HEADS):
            if (heads, decay) in courses:
                course = courses[heads, decay]
                ax.plot(
                    course["samples"],
                    course["effective"],
                    marker="o",
                    markersize=4,
                    color=f"C{number}",
                    label=f"{heads} heads a layer",
                )
        ax.set(xscale="log", title=f"weight decay {decay}", xlabel="samples seen")
    axes[0].set_ylabel("effective number of heads")
    if courses:
        axes[0].legend()
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
