"""In which order abilities come, and when the relation head does.

`python -m recipes.learning_dynamics`

Paper: colour → shape → binding → relation over training (section on learning dynamics); heads over
training are not in it. Falsified by this: shapes that come before colours. Relation implies
binding, and binding shapes, so their order could not be otherwise. The layout dipole does not need
shapes: whether places come before them is a question (exploratory: seen before it was asked).
Beyond the paper: a relation head that comes after the accuracy it is said to cause.

Reads the `dynamics.parquet` of each run (`dit_lens.training.dynamics`): EMA weights at log-spaced
points, 96 held-out scenes. A time is known up to the two points around it, so an interval here is
that bracket, not a sampling error. Times are compared as log2 ratios of samples seen: 1 is twice as
many. All runs share a curriculum (fixed layouts first), which the paper's have not: a time is when
a thing was first there; shapes fall again when layouts spread, and recover.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from dit_lens.stats import Interval
from dit_lens.training import dynamics
from dit_lens.viz import learning_curves, style
from hooked_models.pipelines.hub import ZOO

from .claims import Claim, report

TIE = 1e-9


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    runs: tuple[str, ...] = (
        "rte-micro/seed-1",
        "rte-mini",
        "t5-micro",
        "t5-mini",
        "rte-nano",
        "rte-nopos-micro",
    )
    """Bundled models that bring their course, or folders of training runs."""
    level: float = 0.5
    """From which on a thing counts as there."""
    out: Path = Path("results/learning_dynamics")


def main(config: Config) -> None:
    claims, found = [], {}
    config.out.mkdir(parents=True, exist_ok=True)
    for run in config.runs:
        path = next(
            (
                p
                for p in (ZOO / run / "dynamics.parquet", Path(run) / "dynamics.parquet")
                if p.exists()
            ),
            None,
        )
        if path is None:
            claims.append(
                Claim(
                    f"{run}: order",
                    "colour → shape → binding → relation",
                    Interval(*[np.nan] * 3),
                    (-TIE, 10),
                )
            )
            continue
        table = pd.read_parquet(path)
        came = found[run] = dynamics.emergence(table, config.level).set_index("what")
        claims += [
            Claim(
                f"{run}: shape after color",
                "yes",
                later(came, "color", "shape"),
                (-TIE, 10),
                times(came, "color", "shape"),
            ),
            Claim(
                f"{run}: shape after dipole",
                "–",
                later(came, "dipole", "shape"),
                None,
                times(came, "dipole", "shape"),
            ),
        ]
        for what in [name for name in came.index if "(" in name][:2]:
            claims.append(
                Claim(
                    f"{run}: relation accuracy after head {what}",
                    "–",
                    later(came, what, "relation_loose"),
                    (-TIE, 10),
                    times(came, what, "relation_loose"),
                )
            )
        heads = {source: dynamics.strongest_heads(table, source) for source in dynamics.SOURCES}
        told = times(came, "color", "shape", "unique_binding", "relation_loose")
        told = told.replace("unique_", "").replace("_loose", "")
        figure = learning_curves(
            table,
            {source: chosen for source, chosen in heads.items() if chosen},
            f"{run}: samples until {config.level:g} of the images have it\n{told}",
        )
        style.save(figure, config.out / f"{run.replace('/', '_')}.png")
    report(
        "Learning dynamics",
        claims,
        config.out,
        "96 scenes a point, the same noise at each, 1 run; bounds: the points around",
        level=config.level,
    )
    pd.concat(found, names=["run"]).to_parquet(config.out / "emergence.parquet")


def later(came: pd.DataFrame, early: str, late: str) -> Interval:
    """log2 of how many times more samples the second needed than the first, with the bracket; NaN
    if either never came.
    """
    rows = came.loc[[early, late]]
    if rows["samples"].isna().any():
        return Interval(np.nan, np.nan, np.nan)
    (first, first_before), (second, second_before) = (
        rows[["samples", "before"]].astype(float).clip(lower=1).to_numpy()
    )
    return Interval(
        *(
            float(np.log2(ratio))
            for ratio in (second / first, second_before / first, second / first_before)
        )
    )


def times(came: pd.DataFrame, *names: str) -> str:
    """Samples at which each came, for the table."""
    samples = came["samples"].astype(object)
    return ", ".join(
        f"{name} {'never' if samples[name] is pd.NA else f'{samples[name]:,}'}" for name in names
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
